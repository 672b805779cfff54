//! A union for tests, on layers in a temporary directory.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::{Config, CopyLimit, Follow, LayerSpec, Union, UpperSpec, Uuid, Verity};
use crate::idmap::Ids;

/// Opens a union in the directory `at`, of a lower layer `l` with a file `name` and a directory `dir`, an
/// upper `u` and a workdir `w`, as `change` wants it.
pub(crate) fn open_in(at: &Path, change: impl FnOnce(&mut Config)) -> Union {
    let open = |name: &str| -> OwnedFd {
        std::fs::create_dir_all(at.join(name)).unwrap();
        std::fs::File::open(at.join(name)).unwrap().into()
    };
    let (lower, dir, work) = (open("l"), open("u"), open("w"));
    std::fs::File::create(at.join("l/name")).unwrap().write_all(b"content").unwrap();
    std::fs::create_dir(at.join("l/dir")).unwrap();
    let upper = UpperSpec { dir, work, path: "u".into(), work_path: "w".into() };
    let mut config = Config {
        lowers: vec![LayerSpec { dir: lower, path: "l".into() }],
        upper: Some(upper),
        volatile: true,
        volatile_mark: false,
        userxattr: true,
        index: false,
        uuid: Uuid::Auto,
        copy_limit: CopyLimit { entries: 10, bytes: 1 << 20 },
        follow: Follow::Nobody,
        redirects: false,
        metacopy: false,
        verity: Verity::Off,
        data: Vec::new(),
        overrides: None,
        ids: Ids::default(),
        static_nlink: false,
        ino32: false,
        lacks: Vec::new(),
    };
    change(&mut config);
    Union::open(config).unwrap()
}
