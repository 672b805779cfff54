//! Whether somebody still waits for the request that a thread serves.
//!
//! Only work that may take long and has published nothing asks: copies of file data. As in the
//! kernel's overlayfs, nothing but the end of the caller stops it: programs do not expect `EINTR`
//! from a file, and a timer that interrupted every attempt would keep a large one from ever being
//! copied. So a request that was interrupted goes on until its caller is found to be killed.
//!
//! Nothing is noted when a request begins or ends, but for its number in its thread. Numbers are
//! never used twice, so one that came too late or too early means no other request.
//!
//! Locks: one, for moments.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::sys::process::is_killed;

/// Interrupts remembered; an older one is forgotten, and its request finished.
const REMEMBERED_MAX: usize = 1024;

thread_local! {
    /// Number of the request that this thread serves, 0 for none, and the process that waits for it.
    static SERVED: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

/// Notes what this thread serves from now on: the number of a request, and the process, as this one
/// sees it, that waits for the answer.
pub fn serve(request: u64, pid: u32) {
    SERVED.set((request, pid));
}

/// Returns what this thread serves, for [`serve`] in one that helps it.
pub(super) fn served() -> (u64, u32) {
    SERVED.get()
}

/// Requests that were interrupted.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    /// There were some.
    any: AtomicBool,
    latest: Mutex<VecDeque<u64>>,
}

impl Interrupts {
    /// Notes that a signal came for whoever waits for `request`.
    pub(super) fn note(&self, request: u64) {
        let mut latest = self.latest.lock();
        if latest.len() >= REMEMBERED_MAX {
            latest.pop_front();
        }
        latest.push_back(request);
        self.any.store(true, Ordering::Release);
    }

    /// Tells whether the request that this thread serves has lost its caller.
    pub(super) fn is_given_up(&self) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let (request, pid) = SERVED.get();
        self.latest.lock().contains(&request) && is_killed(pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_killed_caller_gives_up() {
        let interrupts = Interrupts::default();
        serve(4, std::process::id());
        assert!(!interrupts.is_given_up());
        interrupts.note(4);
        // This process was not killed.
        assert!(!interrupts.is_given_up());
        for request in 0..2000 {
            interrupts.note(request * 2);
        }
        assert_eq!(interrupts.latest.lock().len(), REMEMBERED_MAX);
        serve(0, 0);
    }
}
