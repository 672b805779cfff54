//! A union without a mount: its calls are made here, in the process of the test.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use laminafs::mount::MountSpec;
use laminafs::mount::stack::Stack;
use laminafs::options::MountOptions;
use laminafs::union::Union;

/// A directory of its own, removed when dropped.
#[derive(Debug)]
pub struct Place(pub PathBuf);

impl Place {
    /// An empty one.
    #[expect(clippy::new_without_default, reason = "it makes something")]
    pub fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("lamina-unmounted-{}-{next}", std::process::id());
        let parent = std::env::var_os("FUSE_TESTS_DIR").unwrap_or_else(|| "/var/tmp".into());
        let path = Path::new(&parent).join(name);
        std::fs::create_dir(&path).unwrap();
        Place(path)
    }

    /// The union of `lower`, `upper` and `work` in it, with these mount options more.
    pub fn union(&self, options: &str) -> Union {
        let at = |name: &str| {
            let path = self.0.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path.display().to_string()
        };
        let (lower, upper, work) = (at("lower"), at("upper"), at("work"));
        at("merged");
        let list = format!("lowerdir={lower},upperdir={upper},workdir={work},{options}");
        let options = MountOptions::parse(&[list]).unwrap().0;
        let spec = MountSpec::new(options, self.0.join("merged")).unwrap();
        let (config, _merged) = Stack::open(&spec).unwrap().into_config(&spec);
        Union::open(config).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
