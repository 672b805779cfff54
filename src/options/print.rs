//! Options printed so that they parse to the same.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::list::escape;
use super::values::ABILITIES;
use super::{
    DIR_RENAME_ENTRIES, DIR_RENAME_SIZE, MountOptions, Propagation, Transport, Uuid, Verity,
};
use crate::overrides::Form;

impl MountOptions {
    /// Prints the options so that [`MountOptions::parse`] gives them again.
    pub fn print(&self) -> OsString {
        let mut items: Vec<Vec<u8>> = Vec::new();
        let mut flag = |on: bool, name: &str| {
            if on {
                items.push(name.as_bytes().to_vec());
            }
        };
        flag(self.volatile, "volatile");
        flag(self.userxattr, "userxattr");
        flag(self.index, "index=on");
        match self.uuid {
            Uuid::Auto => (),
            Uuid::On => flag(true, "uuid=on"),
            Uuid::Null => flag(true, "uuid=null"),
            Uuid::Off => flag(true, "uuid=off"),
        }
        flag(self.read_only, "ro");
        flag(self.dev, "dev");
        flag(!self.suid, "nosuid");
        flag(!self.exec, "noexec");
        flag(self.allow_other, "allow_other");
        flag(!self.posix_acl, "noacl");
        flag(!self.xattrs, "noxattrs");
        flag(!self.sync, "fsync=0");
        flag(self.static_nlink, "static_nlink");
        flag(self.ino32, "ino32_t");
        flag(self.overrides == Some(Form::Privileged), "xattr_permissions=1");
        flag(self.overrides == Some(Form::Containers), "xattr_permissions=2");
        flag(self.ids.users.squash_to_root, "squash_to_root");
        flag(self.debug, "debug");
        flag(self.writeback, "writeback");
        match self.propagation {
            None => (),
            Some(Propagation::Private) => flag(true, "private"),
            Some(Propagation::Shared) => flag(true, "shared"),
            Some(Propagation::Slave) => flag(true, "slave"),
            Some(Propagation::Unbindable) => flag(true, "unbindable"),
        }
        items.extend(self.labels.iter().cloned());
        if !self.upper_lacks.is_empty() {
            let named = ABILITIES.iter().filter(|(_, ability)| self.upper_lacks.contains(ability));
            let names: Vec<&str> = named.map(|(name, _)| *name).collect();
            items.push(format!("upper_lacks={}", names.join(":")).into_bytes());
        }
        if let Some(threads) = self.threads {
            items.push(format!("threads={threads}").into_bytes());
        }
        if self.transport != Transport::default() {
            items.push(format!("transport={}", self.transport.name()).into_bytes());
        }
        if let Some(timeout) = self.timeout {
            let (whole, rest) = (timeout.as_secs(), timeout.subsec_nanos());
            items.push(format!("timeout={whole}.{rest:09}").into_bytes());
        }
        for (map, ranges, squash) in [
            (&self.ids.users, "uidmapping", "squash_to_uid"),
            (&self.ids.groups, "gidmapping", "squash_to_gid"),
        ] {
            if map.has_ranges() {
                items.push(format!("{ranges}={map}").into_bytes());
            }
            if let Some(all) = map.squash_to {
                items.push(format!("{squash}={all}").into_bytes());
            }
        }
        if let Some(io) = self.io {
            items.push(format!("io={}", io.name()).into_bytes());
        }
        if let Some(level) = self.log_level {
            items.push(format!("log_level={level}").into_bytes());
        }
        if let Some(redirect_dir) = self.redirect_dir {
            items.push(format!("redirect_dir={}", redirect_dir.print()).into_bytes());
        }
        if let Some(metacopy) = self.metacopy {
            items.push(format!("metacopy={}", if metacopy { "on" } else { "off" }).into_bytes());
        }
        match self.verity {
            Verity::Off => {}
            Verity::On => items.push(b"verity=on".to_vec()),
            Verity::Require => items.push(b"verity=require".to_vec()),
        }
        for (name, limit, default) in [
            ("dir_rename_entries", self.dir_rename_entries, DIR_RENAME_ENTRIES),
            ("dir_rename_size", self.dir_rename_size, DIR_RENAME_SIZE),
        ] {
            if limit != default {
                items.push(format!("{name}={limit}").into_bytes());
            }
        }
        let mut value = |name: &str, value: &OsStr| {
            items.push([name.as_bytes(), b"=", &escape(value.as_bytes(), b"\\,")].concat());
        };
        for (name, text) in [("fsname", &self.fsname), ("subtype", &self.subtype)] {
            if let Some(text) = text {
                value(name, text);
            }
        }
        for (name, path) in
            [("log_file", &self.log_file), ("upperdir", &self.upper), ("workdir", &self.work)]
        {
            if let Some(path) = path {
                value(name, path.as_os_str());
            }
        }
        if !self.lowers.is_empty() {
            let lowers: Vec<Vec<u8>> = self
                .lowers
                .iter()
                .map(|path| escape(path.as_os_str().as_bytes(), b"\\,:"))
                .collect();
            items.push([b"lowerdir=".as_slice(), &lowers.join(&b':')].concat());
        }
        for path in &self.data {
            let path = escape(path.as_os_str().as_bytes(), b"\\,");
            items.push([b"datadir+=".as_slice(), &path].concat());
        }
        OsString::from_vec(items.join(&b','))
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::idmap::IdMap;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn any_path() -> impl Strategy<Value = PathBuf> {
        let byte = prop_oneof![
            Just(b','),
            Just(b':'),
            Just(b'\\'),
            Just(b'"'),
            Just(b'='),
            Just(b'/'),
            1u8..=255
        ];
        proptest::collection::vec(byte, 1..12).prop_map(|bytes| OsString::from_vec(bytes).into())
    }

    fn any_options() -> impl Strategy<Value = MountOptions> {
        let paths = (
            proptest::collection::vec(any_path(), 0..4),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
            proptest::option::of(any_path()),
        );
        let levels = proptest::option::of(prop_oneof![
            Just(LevelFilter::OFF),
            Just(LevelFilter::WARN),
            Just(LevelFilter::TRACE)
        ]);
        let propagation = proptest::option::of(prop_oneof![
            Just(Propagation::Private),
            Just(Propagation::Shared),
            Just(Propagation::Slave),
            Just(Propagation::Unbindable)
        ]);
        let transport =
            prop_oneof![Just(Transport::Dev), Just(Transport::Uring), Just(Transport::Fuser)];
        let io = proptest::option::of(prop_oneof![
            Just(IoMode::NoOpen),
            Just(IoMode::Open),
            Just(IoMode::Passthrough)
        ]);
        let redirect = proptest::option::of(prop_oneof![
            Just(RedirectDir::On),
            Just(RedirectDir::Off),
            Just(RedirectDir::Follow),
            Just(RedirectDir::NoFollow)
        ]);
        let redirect = (redirect, proptest::option::of(any::<bool>()));
        let limits = (any::<u64>(), any::<u64>(), redirect);
        let rest =
            (proptest::option::of(1..=THREADS_MAX), levels, propagation, io, limits, transport);
        let ids = (
            prop_oneof![Just("0:100000:65536"), Just("0:1:1500:1500:0:1"), Just("")],
            proptest::option::of(0..u32::MAX),
            any::<[bool; 6]>(),
            proptest::option::of((any::<u64>(), 0..1_000_000_000_u32)),
            proptest::option::of(prop_oneof![Just(Form::Privileged), Just(Form::Containers)]),
        );
        let all = (paths, proptest::array::uniform10(any::<bool>()), rest, ids);
        all.prop_map(|(paths, flags, rest, ids)| {
            let [
                volatile,
                userxattr,
                index,
                read_only,
                dev,
                suid,
                exec,
                allow_other,
                posix_acl,
                debug,
            ] = flags;
            let (lowers, upper, work, log_file, fsname, subtype) = paths;
            let (threads, log_level, propagation, io, limits, transport) = rest;
            let (ranges, squash, more_flags, timeout, overrides) = ids;
            let [xattrs, sync, static_nlink, squash_to_root, writeback, ino32] = more_flags;
            let mut ids = Ids::default();
            ids.users.take_ranges(IdMap::parse(ranges).unwrap_or_default());
            ids.groups.squash_to = squash;
            (ids.users.squash_to_root, ids.groups.squash_to_root) =
                (squash_to_root, squash_to_root);
            MountOptions {
                lowers,
                upper,
                work,
                volatile,
                sync,
                xattrs,
                static_nlink,
                ino32,
                overrides,
                ids,
                timeout: timeout.map(|(secs, nanos)| Duration::new(secs, nanos)),
                userxattr,
                redirect_dir: limits.2.0,
                metacopy: limits.2.1,
                verity: if limits.0 % 2 == 0 { Verity::Off } else { Verity::Require },
                data: log_file.clone().into_iter().collect(),
                index,
                uuid: if index { Uuid::On } else { Uuid::Off },
                dir_rename_entries: limits.0,
                dir_rename_size: limits.1,
                read_only,
                dev,
                suid,
                exec,
                propagation,
                allow_other,
                posix_acl,
                debug,
                threads,
                transport,
                io,
                writeback,
                log_level,
                log_file,
                labels: Vec::new(),
                upper_lacks: Vec::new(),
                fsname: fsname.map(PathBuf::into_os_string),
                subtype: subtype.map(PathBuf::into_os_string),
            }
        })
    }

    proptest! {
        #[test]
        fn printed_options_parse_to_the_same(options in any_options()) {
            let printed = options.print();
            let (parsed, ignored) = MountOptions::parse(&[&printed]).unwrap();
            prop_assert_eq!(parsed, options);
            prop_assert!(ignored.is_empty());
        }

        #[test]
        fn what_is_accepted_prints_to_the_same(
            list in r#"((context|fscontext|lowerdir|fsname)=[ab,:="\\]{0,6}(,|,,)?|ro,){0,6}"#,
            more in r#"(context|upperdir)=[a,"\\]{0,4}"#,
        ) {
            if let Ok((parsed, _)) = MountOptions::parse(&[list, more]) {
                let again = MountOptions::parse(&[parsed.print()]);
                prop_assert_eq!(again.unwrap().0, parsed);
            }
        }

        #[test]
        fn no_list_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            drop(MountOptions::parse(&[OsString::from_vec(bytes)]));
        }

        #[test]
        fn near_misses_do_not_panic(list in r#"(lowerdir=|context="|,|:|\\|"|a|=|ro){0,20}"#) {
            drop(MountOptions::parse(&[list]));
        }
    }
}
