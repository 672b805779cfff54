//! The same call for many parts of a directory: a stack may have hundreds, and the client waits.

use crate::sys;

/// Fewer are done sooner than a thread is started.
const PARTS_MIN: usize = 48;

/// As many are begun before one is found to be the last.
const PARTS_MAX: usize = 128;

/// Splits items that may end before the last: into single ones, or where there are many, so that each piece is worth a
/// second thread.
pub(super) fn pieces<T>(items: &[T]) -> std::slice::Chunks<'_, T> {
    items.chunks(if items.len() < PARTS_MIN { 1 } else { PARTS_MAX })
}

/// Returns what `work` makes of each item, in order. Where there are many a second thread does half of them.
pub(super) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if items.len() < PARTS_MIN || sys::process::cpus() == 1 {
        return items.iter().map(work).collect();
    }
    let (own, others) = items.split_at(items.len() / 2);
    let help = || {
        if let Err(errno) = sys::process::unbind() {
            tracing::debug!(%errno, "a helper stays on the CPU of its caller");
        }
        others.iter().map(&work).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let helper = std::thread::Builder::new().name("helper".into()).spawn_scoped(scope, help);
        let mut done: Vec<_> = own.iter().map(&work).collect();
        done.extend(match helper {
            Ok(helper) => helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // No thread is to be had.
            Err(_) => others.iter().map(&work).collect(),
        });
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_done_once_in_order() {
        for count in [0, 1, PARTS_MIN - 1, PARTS_MIN, 501] {
            let items: Vec<_> = (0..count).collect();
            assert_eq!(
                each(&items, |item| item * 2),
                items.iter().map(|item| item * 2).collect::<Vec<_>>()
            );
        }
    }
}
