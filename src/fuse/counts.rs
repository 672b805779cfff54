//! How many requests of each kind a mount has served: for budgets in tests, and for whoever wonders
//! what a program asks of it.

use super::dev::opcode_name;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Opcodes that are told apart; higher ones count as the first, which no request has.
const OPCODES: usize = 64;

/// Requests served, by opcode. Monotonic; read and written from any thread.
#[derive(Debug)]
pub struct RequestCounts([AtomicU64; OPCODES]);

impl Default for RequestCounts {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl RequestCounts {
    /// Counts one request.
    pub(super) fn count(&self, opcode: u32) {
        let slot = usize::try_from(opcode).ok().and_then(|slot| self.0.get(slot));
        if let Some(slot) = slot.or(self.0.first()) {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `LOOKUP=3 GETATTR=1`: the opcodes that came at all, in the order of their numbers.
impl fmt::Display for RequestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        for (opcode, count) in (0..).zip(&self.0) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                write!(f, "{between}{}={count}", opcode_name(opcode))?;
                between = " ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_name() {
        let counts = RequestCounts::default();
        for opcode in [3, 1, 1, 53, 63, 64, u32::MAX] {
            counts.count(opcode);
        }
        let text = "UNKNOWN=2 LOOKUP=2 GETATTR=1 COPY_FILE_RANGE_64=1 UNKNOWN=1";
        assert_eq!(counts.to_string(), text);
    }
}
