//! Looking for what is wrong with a store of old, and mending it.
//!
//! Looking takes no lock and changes nothing. Mending never removes what has content. A crash while
//! mending leaves less to mend.

use std::path::Path;

use super::check::{Finding, Kind, dead_mounts};
use super::driver::Driver;
use super::layout::{Home, LayerId};
use super::mounts::list_counts;
use super::stage;
use crate::error::Result;
use crate::options::show_path;

/// What was found, and whether it is mended on the way.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) all: Vec<Finding>,
    pub(super) mends: bool,
}

impl Findings {
    /// Takes note of something.
    pub(super) fn note(&mut self, kind: Kind, what: impl ToString, detail: impl Into<String>) {
        self.all.push(Finding { kind, what: what.to_string(), detail: detail.into() });
    }

    /// Takes note of something, and mends it by `mend` if that is asked for.
    ///
    /// # Errors
    /// Those of `mend`.
    pub(super) fn mend(
        &mut self,
        kind: Kind,
        what: impl ToString,
        detail: impl Into<String>,
        mend: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.note(kind, what, detail);
        if self.mends { mend() } else { Ok(()) }
    }
}

/// Looks at a store: at its layers by `look`, and at what processes left. `recover` removes what is in
/// temporary directories of nobody, `forget` the count of a layer that is not mounted.
///
/// # Errors
/// Those of reading and mending; damage is no error.
pub(super) fn check(
    store: &dyn Driver,
    home: &Home,
    run_home: &Path,
    mends: bool,
    look: impl FnOnce(&mut Findings) -> Result<()>,
    recover: impl FnOnce() -> Result<()>,
    forget: impl Fn(&LayerId) -> Result<()>,
) -> Result<Vec<Finding>> {
    let mut found = Findings { all: Vec::new(), mends };
    look(&mut found)?;
    let stale = stage::find_stale(home)?;
    for name in &stale {
        let detail = "of a process that was killed; the next start removes it";
        found.note(Kind::StaleTemp, name, detail);
    }
    if mends && !stale.is_empty() {
        recover()?;
    }
    for path in dead_mounts(home.path())? {
        let detail = "its server is gone; it is unmounted";
        found.mend(Kind::DeadMount, show_path(&path), detail, || {
            crate::mount::unmount::remove_dead(&path)
        })?;
    }
    for (id, count) in list_counts(run_home)? {
        if store.exists(&id)? && store.is_mounted(&id)? {
            continue;
        }
        let detail = format!("counted {count} times, but not mounted");
        found.mend(Kind::StaleCount, &id, detail, || forget(&id))?;
    }
    found.all.sort_by(|a, b| (a.kind, &a.what).cmp(&(b.kind, &b.what)));
    Ok(found.all)
}
