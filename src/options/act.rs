//! Options that act: what each name and value set.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::list::{label, needed, parse_lowers, path, text};
use super::passive::unknown;
use super::values::{
    parse_abilities, parse_id, parse_ids, parse_io, parse_seconds, parse_size, parse_switch,
    parse_transport, parse_uuid,
};
use super::{MountOptions, Propagation, RedirectDir, Verity, parse_level, parse_threads};
use crate::error::{Error, Result};
use crate::overrides::Form;

/// Names that act; [`MountOptions::act`] has the meaning of each.
pub(super) const ACTING: &str = "index uuid lowerdir lowerdir+ upperdir workdir volatile userxattr redirect_dir metacopy verity datadir+ \
     dir_rename_entries dir_rename_size ro rw dev nodev suid \
     nosuid exec noexec private rprivate shared rshared slave rslave unbindable runbindable \
     user users owner group allow_other noacl debug threads io transport writeback fsname subtype log_level log_file context fscontext defcontext \
     rootcontext uidmapping gidmapping squash_to_root squash_to_uid squash_to_gid static_nlink ino32_t \
     noxattrs timeout threaded fsync xattr_permissions upper_lacks";

impl MountOptions {
    /// Carries out one option of [`ACTING`].
    pub(super) fn act(&mut self, key: &str, value: Option<&[u8]>) -> Result<()> {
        match key {
            "lowerdir" => (self.lowers, self.data) = parse_lowers(needed(key, value)?)?,
            "datadir+" => self.data.push(path(key, value)?),
            "metacopy" => self.metacopy = Some(parse_switch(key, value)?),
            "verity" => {
                self.verity = match needed(key, value)? {
                    b"off" => Verity::Off,
                    b"on" => Verity::On,
                    b"require" => Verity::Require,
                    other => {
                        return Err(Error::invalid(
                            format!("verity={}", text(other)),
                            "is none of off, on, require",
                        ));
                    }
                }
            }
            "lowerdir+" => self.lowers.push(PathBuf::from(OsStr::from_bytes(needed(key, value)?))),
            "upperdir" => self.upper = Some(path(key, value)?),
            "workdir" => self.work = Some(path(key, value)?),
            "log_file" => self.log_file = Some(path(key, value)?),
            "fsname" => self.fsname = Some(path(key, value)?.into_os_string()),
            "subtype" => self.subtype = Some(path(key, value)?.into_os_string()),
            "context" | "fscontext" | "defcontext" | "rootcontext" => {
                let label = label(key, needed(key, value)?)?;
                self.labels.push([key.as_bytes(), b"=", label].concat());
            }
            "log_level" => self.log_level = Some(parse_level(&text(needed(key, value)?))?),
            "upper_lacks" => self.upper_lacks = parse_abilities(&text(needed(key, value)?))?,
            "transport" => self.transport = parse_transport(&text(needed(key, value)?))?,
            "redirect_dir" => {
                self.redirect_dir = Some(RedirectDir::parse(needed(key, value)?)?);
            }
            "index" => self.index = parse_switch(key, value)?,
            "uuid" => self.uuid = parse_uuid(&text(needed(key, value)?))?,
            "dir_rename_entries" => self.dir_rename_entries = parse_size(key, needed(key, value)?)?,
            "dir_rename_size" => self.dir_rename_size = parse_size(key, needed(key, value)?)?,
            "io" => self.io = parse_io(&text(needed(key, value)?))?,
            "uidmapping" => self.ids.users.take_ranges(parse_ids(key, value)?),
            "gidmapping" => self.ids.groups.take_ranges(parse_ids(key, value)?),
            "squash_to_uid" => self.ids.users.squash_to = Some(parse_id(key, value)?),
            "squash_to_gid" => self.ids.groups.squash_to = Some(parse_id(key, value)?),
            "squash_to_root" => {
                let on = parse_switch(key, value)?;
                (self.ids.users.squash_to_root, self.ids.groups.squash_to_root) = (on, on);
            }
            "xattr_permissions" => {
                self.overrides = match needed(key, value)? {
                    b"0" => None,
                    b"1" => Some(Form::Privileged),
                    b"2" => Some(Form::Containers),
                    other => {
                        let option = format!("{key}={}", text(other));
                        return Err(Error::invalid(option, "is none of 0, 1, 2"));
                    }
                };
            }
            "writeback" => self.writeback = parse_switch(key, value)?,
            "ino32_t" => self.ino32 = parse_switch(key, value)?,
            "static_nlink" => self.static_nlink = parse_switch(key, value)?,
            "noxattrs" => self.xattrs = !parse_switch(key, value)?,
            "fsync" => self.sync = parse_switch(key, value)?,
            "timeout" => self.timeout = Some(parse_seconds(&text(needed(key, value)?))?),
            "threaded" => match (parse_switch(key, value)?, self.threads) {
                (false, _) => self.threads = Some(1),
                (true, Some(1)) => self.threads = None,
                (true, _) => (),
            },
            "threads" => self.threads = Some(parse_threads(&text(needed(key, value)?))?),
            flag => {
                if let Some(value) = value {
                    return Err(Error::invalid(
                        format!("{flag}={}", text(value)),
                        format!("{flag} takes no value; write just {flag}"),
                    ));
                }
                match flag {
                    "volatile" => self.volatile = true,
                    "userxattr" => self.userxattr = true,
                    "ro" => self.read_only = true,
                    "rw" => self.read_only = false,
                    "dev" => self.dev = true,
                    "nodev" => self.dev = false,
                    "suid" => self.suid = true,
                    "nosuid" => self.suid = false,
                    "exec" => self.exec = true,
                    "noexec" => self.exec = false,
                    // What mount(8) takes them to imply.
                    "owner" | "group" => (self.suid, self.dev) = (false, false),
                    "user" | "users" => {
                        (self.suid, self.dev, self.exec) = (false, false, false);
                    }
                    "private" | "rprivate" => self.propagation = Some(Propagation::Private),
                    "shared" | "rshared" => self.propagation = Some(Propagation::Shared),
                    "slave" | "rslave" => self.propagation = Some(Propagation::Slave),
                    "unbindable" | "runbindable" => {
                        self.propagation = Some(Propagation::Unbindable);
                    }
                    "allow_other" => self.allow_other = true,
                    "noacl" => self.posix_acl = false,
                    "debug" => self.debug = true,
                    other => return Err(unknown(other.as_bytes())),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, refusal};
    use super::*;
    use std::time::Duration;

    #[test]
    fn redirects_and_what_depends_on_them() {
        let options = parse("redirect_dir=follow,metacopy=off,verity=require");
        assert_eq!(options.redirect_dir, Some(RedirectDir::Follow));
        assert_eq!((options.metacopy, options.verity), (Some(false), Verity::Require));
        for list in ["redirect_dir=yes", "redirect_dir", "metacopy=x", "verity=1", "verity"] {
            let message = refusal(list);
            assert!(message.starts_with(list.split_once('=').map_or(list, |(key, _)| key)));
        }
    }

    #[test]
    fn what_fuse_overlayfs_takes_has_its_meaning() {
        let list = ":0:1:1500:1500:0:1,uidmapping=:0:100000:65536,gidmapping=0:7:1,squash_to_gid=9";
        let options = parse(&format!("uidmapping={list}"));
        assert_eq!(options.ids.users.to_string(), "0:100000:65536");
        assert_eq!(options.ids.groups.to_string(), "0:7:1");
        assert_eq!(options.ids.groups.squash_to, Some(9));
        assert!(parse("squash_to_root,squash_to_root=0").ids.is_identity());
        assert!(parse("squash_to_root=1,gidmapping=0:1:1").ids.groups.squash_to_root);
        assert_eq!(parse("xattr_permissions=1").overrides, Some(Form::Privileged));
        assert_eq!(
            parse("xattr_permissions=1,xattr_permissions=2").overrides,
            Some(Form::Containers)
        );
        assert_eq!(parse("xattr_permissions=2,xattr_permissions=0").overrides, None);
        assert!(parse("ino32_t").ino32 && parse("ino32_t=1").ino32 && !parse("ino32_t=0").ino32);
        let options = parse("static_nlink,noxattrs=1,fsync=0,threaded=0,timeout=1.25");
        assert!(options.static_nlink && !options.xattrs && !options.sync);
        assert_eq!(options.threads, Some(1));
        assert_eq!(options.timeout, Some(Duration::from_millis(1250)));
        let options = parse("static_nlink=0,noxattrs=0,fsync=1,threaded=0,threaded=1,timeout=0");
        let expected = MountOptions { timeout: Some(Duration::ZERO), ..Default::default() };
        assert_eq!(options, expected);
    }

    #[test]
    fn later_flags_win() {
        let options = parse("ro,nosuid,noexec,dev,rw,suid,exec,nodev,private,rshared");
        let expected =
            MountOptions { propagation: Some(Propagation::Shared), ..Default::default() };
        assert_eq!(options, expected);
    }
}
