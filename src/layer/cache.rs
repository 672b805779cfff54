//! Open directory handles, bounded: any of them can be closed and opened again.
//!
//! Locks: one per shard, never held over a system call.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

const SHARDS: usize = 16;

/// The handles used last, by directory number.
#[derive(Debug)]
pub struct HandleCache {
    shards: [Mutex<LruCache<u64, Arc<OwnedFd>>>; SHARDS],
}

impl HandleCache {
    /// Keeps about `bound` handles open, at least one for each shard.
    pub fn new(bound: usize) -> Self {
        let each = NonZeroUsize::new(bound / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self { shards: std::array::from_fn(|_| Mutex::new(LruCache::new(each))) }
    }

    /// Returns how many handles are kept open at most.
    pub fn bound(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().cap().get()).sum()
    }

    /// Returns the open handle of directory `id`, if it is still there.
    pub fn get(&self, id: u64) -> Option<Arc<OwnedFd>> {
        self.shard(id).lock().get(&id).cloned()
    }

    /// Keeps `handle`; returns the one to use, which is another thread's if that was first.
    pub fn put(&self, id: u64, handle: OwnedFd) -> Arc<OwnedFd> {
        let handle = Arc::new(handle);
        let mut shard = self.shard(id).lock();
        if let Some(earlier) = shard.get(&id) {
            return Arc::clone(earlier);
        }
        let evicted = shard.push(id, Arc::clone(&handle));
        drop(shard);
        drop(evicted);
        handle
    }

    /// Forgets directory `id`; users that have its handle keep it.
    pub fn remove(&self, id: u64) {
        let removed = self.shard(id).lock().pop(&id);
        drop(removed);
    }

    /// Closes all handles that nobody uses, after the process ran out of descriptors.
    pub fn shrink(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            for _ in 0..shard.len() / 2 {
                shard.pop_lru();
            }
        }
    }

    fn shard(&self, id: u64) -> &Mutex<LruCache<u64, Arc<OwnedFd>>> {
        // Directories looked at leave gaps between those whose handles are kept.
        let mixed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        #[expect(clippy::indexing_slicing, reason = "the remainder is below the length")]
        &self.shards[usize::try_from(mixed % SHARDS as u64).unwrap_or(0)]
    }
}
