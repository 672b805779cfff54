//! What a rename does, decided by what its two names show and hide: no I/O.

use rustix::fs::RenameFlags;

use crate::error::Errno;

/// One side of a rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Side {
    pub(super) is_dir: bool,
    /// Not a directory with lower parts.
    pub(super) is_movable: bool,
    /// There is an upper object under the name.
    pub(super) is_upper: bool,
    /// No directory, or one that shows nothing.
    pub(super) is_empty: bool,
}

/// What the two names show and hide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) flags: RenameFlags,
    pub(super) lower_parts: LowerParts,
    pub(super) source: Side,
    pub(super) target: Option<Side>,
    /// Lower layers show something under the old name.
    pub(super) below_source: bool,
    /// Lower layers show something under the new name.
    pub(super) below_target: bool,
    /// A whiteout lies under the new name in the upper.
    pub(super) whiteout: bool,
}

/// What becomes of the lower parts of a directory that is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LowerParts {
    /// It does not move.
    Stay,
    /// Its upper part is completed first.
    Copy,
    /// A redirect leads to them.
    Redirect,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Bring all that these directories hold to the upper, and look again.
    Flatten { source: bool, target: bool },
    /// Rename.
    Rename(Plan),
}

/// The rename itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Flags of the one renameat2(2).
    pub(super) flags: RenameFlags,
    /// The moved directory needs a redirect.
    pub(super) redirect_source: bool,
    /// The other directory of an exchange needs one.
    pub(super) redirect_target: bool,
    /// The moved directory must hide what lies beneath its new place.
    pub(super) opaque_source: bool,
    /// The other directory of an exchange likewise.
    pub(super) opaque_target: bool,
    /// The upper part of the replaced directory may hold whiteouts: then an empty one takes its
    /// place first.
    pub(super) clear_target: bool,
    /// The exchange left a whiteout under the old name that hides nothing.
    pub(super) drop_whiteout: bool,
    /// The old name hides something from now on.
    pub(super) leaves_whiteout: bool,
}

impl Plan {
    /// Tells whether a directory changes places with a whiteout, not two objects at a user's wish.
    pub(super) fn is_swap(&self) -> bool {
        self.flags == RenameFlags::EXCHANGE && (self.drop_whiteout || self.leaves_whiteout)
    }
}

/// Decides a rename.
///
/// # Errors
/// `EINVAL` for flags that overlayfs does not take, `EEXIST`, `ENOENT`, `ENOTDIR`, `EISDIR`,
/// `ENOTEMPTY`; `EXDEV` for a directory whose lower parts stay.
pub(super) fn plan_rename(case: &Case) -> std::result::Result<Step, Errno> {
    let exchange = case.flags == RenameFlags::EXCHANGE;
    let known = RenameFlags::NOREPLACE | RenameFlags::WHITEOUT;
    if !exchange && !(case.flags - known).is_empty() {
        return Err(Errno::INVAL);
    }
    let source = case.source;
    match case.target {
        None if exchange => return Err(Errno::NOENT),
        Some(_) if case.flags.contains(RenameFlags::NOREPLACE) => return Err(Errno::EXIST),
        Some(target) if !exchange && source.is_dir && !target.is_dir => return Err(Errno::NOTDIR),
        Some(target) if !exchange && !source.is_dir && target.is_dir => return Err(Errno::ISDIR),
        _ => {}
    }
    let redirect_source = !source.is_movable;
    let redirect_target = exchange && case.target.is_some_and(|target| !target.is_movable);
    let is_movable = !redirect_source && !redirect_target;
    if !is_movable && case.lower_parts == LowerParts::Stay {
        return Err(Errno::XDEV);
    }
    if !exchange && case.target.is_some_and(|target| !target.is_empty) {
        return Err(Errno::NOTEMPTY);
    }
    if !is_movable && case.lower_parts == LowerParts::Copy {
        return Ok(Step::Flatten { source: redirect_source, target: redirect_target });
    }
    // A redirect hides what lies beneath the new name.
    let opaque_source = source.is_dir && !redirect_source && case.below_target;
    if exchange {
        let target_is_dir = case.target.is_some_and(|target| target.is_dir);
        return Ok(Step::Rename(Plan {
            flags: RenameFlags::EXCHANGE,
            redirect_source,
            redirect_target,
            opaque_source,
            opaque_target: target_is_dir && !redirect_target && case.below_source,
            clear_target: false,
            drop_whiteout: false,
            leaves_whiteout: false,
        }));
    }
    // A directory cannot be renamed over a whiteout, but can change places with it.
    let swap = source.is_dir && case.whiteout;
    Ok(Step::Rename(Plan {
        flags: match (swap, case.below_source) {
            (true, _) => RenameFlags::EXCHANGE,
            (false, true) => RenameFlags::WHITEOUT,
            (false, false) => RenameFlags::empty(),
        },
        redirect_source,
        redirect_target,
        opaque_source,
        opaque_target: false,
        clear_target: source.is_dir && case.target.is_some_and(|target| target.is_upper),
        drop_whiteout: swap && !case.below_source,
        leaves_whiteout: case.below_source,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Side = Side { is_dir: false, is_movable: true, is_upper: true, is_empty: true };
    const DIR: Side = Side { is_dir: true, is_movable: true, is_upper: true, is_empty: true };
    const PLAIN: Case = Case {
        flags: RenameFlags::empty(),
        lower_parts: LowerParts::Stay,
        source: FILE,
        target: None,
        below_source: false,
        below_target: false,
        whiteout: false,
    };
    const NOTHING: Plan = Plan {
        flags: RenameFlags::empty(),
        redirect_source: false,
        redirect_target: false,
        opaque_source: false,
        opaque_target: false,
        clear_target: false,
        drop_whiteout: false,
        leaves_whiteout: false,
    };

    #[test]
    fn refusals() {
        let both = RenameFlags::WHITEOUT | RenameFlags::EXCHANGE;
        let merged = Side { is_movable: false, ..DIR };
        let full = Side { is_empty: false, ..DIR };
        let cases = [
            (Case { flags: both, ..PLAIN }, Errno::INVAL),
            (Case { flags: RenameFlags::EXCHANGE, ..PLAIN }, Errno::NOENT),
            (Case { flags: RenameFlags::NOREPLACE, target: Some(FILE), ..PLAIN }, Errno::EXIST),
            (Case { target: Some(DIR), ..PLAIN }, Errno::ISDIR),
            (Case { source: DIR, target: Some(FILE), ..PLAIN }, Errno::NOTDIR),
            (Case { source: merged, ..PLAIN }, Errno::XDEV),
            (Case { flags: RenameFlags::EXCHANGE, target: Some(merged), ..PLAIN }, Errno::XDEV),
            (Case { source: merged, target: Some(full), ..PLAIN }, Errno::XDEV),
            (Case { source: DIR, target: Some(full), ..PLAIN }, Errno::NOTEMPTY),
        ];
        for (case, errno) in cases {
            assert_eq!(plan_rename(&case), Err(errno), "{case:?}");
        }
    }

    #[test]
    fn directories_with_lower_parts_are_completed_before_they_move() {
        let merged = Side { is_movable: false, ..DIR };
        let full = Side { is_empty: false, ..DIR };
        let copy = Case { lower_parts: LowerParts::Copy, source: DIR, ..PLAIN };
        let exchange = Case { flags: RenameFlags::EXCHANGE, ..copy };
        let both = |source, target| Ok(Step::Flatten { source, target });
        let cases = [
            (Case { source: merged, ..copy }, both(true, false)),
            (Case { source: merged, target: Some(DIR), ..copy }, both(true, false)),
            // What is replaced is gone, whatever it was made of.
            (Case { source: merged, target: Some(merged), ..copy }, both(true, false)),
            (Case { source: merged, target: Some(full), ..copy }, Err(Errno::NOTEMPTY)),
            (Case { source: merged, target: Some(FILE), ..copy }, Err(Errno::NOTDIR)),
            (Case { target: Some(merged), ..exchange }, both(false, true)),
            (Case { source: merged, target: Some(merged), ..exchange }, both(true, true)),
            (Case { source: merged, target: Some(full), ..exchange }, both(true, false)),
        ];
        for (case, step) in cases {
            assert_eq!(plan_rename(&case), step, "{case:?}");
        }
    }

    #[test]
    fn redirects_hide_what_lies_beneath_the_new_name() {
        let merged = Side { is_movable: false, ..DIR };
        let redirect = Case { lower_parts: LowerParts::Redirect, below_source: true, ..PLAIN };
        let moved = Plan {
            flags: RenameFlags::WHITEOUT,
            redirect_source: true,
            leaves_whiteout: true,
            ..NOTHING
        };
        let swapped = Plan { flags: RenameFlags::EXCHANGE, ..NOTHING };
        let exchange = Case { flags: RenameFlags::EXCHANGE, below_target: true, ..redirect };
        let cases = [
            (Case { source: merged, ..redirect }, moved),
            (Case { source: merged, below_target: true, ..redirect }, moved),
            (
                Case { source: merged, target: Some(DIR), ..exchange },
                Plan { redirect_source: true, opaque_target: true, ..swapped },
            ),
            (
                Case { source: DIR, target: Some(merged), ..exchange },
                Plan { redirect_target: true, opaque_source: true, ..swapped },
            ),
            (
                Case { source: merged, target: Some(merged), ..exchange },
                Plan { redirect_source: true, redirect_target: true, ..swapped },
            ),
        ];
        for (case, plan) in cases {
            assert_eq!(plan_rename(&case), Ok(Step::Rename(plan)), "{case:?}");
        }
    }

    #[test]
    fn plans() {
        let cases = [
            (PLAIN, NOTHING),
            (
                Case { below_source: true, ..PLAIN },
                Plan { flags: RenameFlags::WHITEOUT, leaves_whiteout: true, ..NOTHING },
            ),
            // A file goes over a whiteout, and hides what it hid.
            (Case { whiteout: true, below_target: true, ..PLAIN }, NOTHING),
            (
                Case { source: DIR, whiteout: true, below_target: true, ..PLAIN },
                Plan {
                    flags: RenameFlags::EXCHANGE,
                    opaque_source: true,
                    drop_whiteout: true,
                    ..NOTHING
                },
            ),
            (
                Case { source: DIR, whiteout: true, below_source: true, ..PLAIN },
                Plan { flags: RenameFlags::EXCHANGE, leaves_whiteout: true, ..NOTHING },
            ),
            (
                Case { source: DIR, target: Some(DIR), below_target: true, ..PLAIN },
                Plan { opaque_source: true, clear_target: true, ..NOTHING },
            ),
            (
                Case {
                    source: DIR,
                    target: Some(Side { is_upper: false, ..DIR }),
                    below_target: true,
                    ..PLAIN
                },
                Plan { opaque_source: true, ..NOTHING },
            ),
            (
                Case {
                    flags: RenameFlags::EXCHANGE,
                    source: DIR,
                    target: Some(FILE),
                    below_source: true,
                    below_target: true,
                    ..PLAIN
                },
                Plan { flags: RenameFlags::EXCHANGE, opaque_source: true, ..NOTHING },
            ),
        ];
        for (case, plan) in cases {
            assert_eq!(plan_rename(&case), Ok(Step::Rename(plan)), "{case:?}");
        }
    }
}
