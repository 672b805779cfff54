//! Reading ahead of a walk.
//!
//! Programs that walk a tree (find, du, tar, cp, rm, git) list a directory, and then the directories in it, most in the
//! order in which they were listed, others from the last to the first (a stack), or by name. Once one does, what comes
//! next is read before it is asked for, by a thread that has given its answer, while others serve: the names of the next
//! directories are merged, and what they show is looked up.
//!
//! What was read ahead may be shown, because lower layers do not change and the listing tells what the upper has: what its
//! numbers have come to stand for in the upper is not taken from here. It is kept until its directory has been listed, or
//! one is that was not foreseen.
//!
//! Locks: `Ahead::reader` is held over the calls of whoever reads ahead, and tried only. `Ahead::walk` is a leaf.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::attr::FileType;
use super::listing::Child;
use super::lookup::Found;
use super::node::{Name, Node, NodeId};
use super::{Union, lock};
use crate::error::Result;
use crate::layer::UPPER;

/// Directories read ahead at most, after a few that were foreseen.
const DIRS_MAX: usize = 8;

/// Objects looked up ahead at most, and those of one directory.
const OBJECTS_MAX: usize = 4096;
const OBJECTS_EACH: usize = 512;

/// Those of the first directories: a few more than an answer of 32 KiB has. It depends on the program and on the kernel how
/// many are of use: a program that looks at all it lists gets all with their attributes, others only the first answer.
const OBJECTS_FIRST: usize = 208;

/// Objects looked up before others may change the directory.
const OBJECTS_AT_ONCE: usize = 16;

/// Names of a directory that is read ahead, about: who needs it waits meanwhile.
const NAMES_MAX: usize = 8192;

/// Directories that are remembered as listed: the last one, and those above it.
const LEVELS_MAX: usize = 64;

/// So many directories of one tell in what order the others come.
const STEPS_TELLING: usize = 3;

/// Stands for no inode number.
const NOTHING: u64 = 0;

/// Directories that are remembered to come.
const NEXT_MAX: usize = 8192;

/// What is read ahead in a union, one walk at a time.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    walk: Mutex<Walk>,
    /// Somebody reads ahead, where there is something to.
    used: AtomicBool,
    /// There is something to read.
    due: AtomicBool,
    /// Number of the directory that is being read, while it is to come.
    reading: AtomicU64,
    /// Held by whoever reads ahead.
    reader: Mutex<()>,
}

/// A walk as far as it has come, and what is ready for its next steps.
#[derive(Debug)]
struct Walk {
    /// The directory listed last, and the ones above it that the walk came through, topmost first.
    levels: Vec<Level>,
    /// 0 if the last directory was not foreseen; else one more than the directories that found something ready.
    foreseen: usize,
    ready: Vec<Ready>,
    /// What was ready of the directory listed last.
    current: Option<Arc<Ready>>,
    /// Objects of one directory that are looked up.
    each: usize,
}

impl Default for Walk {
    fn default() -> Self {
        Self {
            levels: Vec::new(),
            foreseen: 0,
            ready: Vec::new(),
            current: None,
            each: OBJECTS_FIRST,
        }
    }
}

/// A directory that was listed.
#[derive(Debug)]
struct Level {
    dir: NodeId,
    /// How many directories it was found to have.
    shown: u64,
    /// Those of them that are still to come.
    next: VecDeque<Next>,
    /// In what order they are thought to.
    order: Order,
    /// They stand in that order.
    arranged: bool,
    /// How many of them were listed.
    steps: usize,
    /// How many of them were read ahead.
    read: usize,
    /// The last of those has directories in it, which come before the next here.
    deeper: bool,
}

/// A directory still to come.
#[derive(Debug)]
struct Next {
    /// Its inode number.
    ino: u64,
    /// Its position in the listing.
    at: u64,
    name: Name,
}

/// The order in which a program goes through the directories of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Order {
    /// As they were listed.
    #[default]
    Listed,
    /// From the last to the first.
    Reversed,
    ByName,
}

impl Order {
    const ALL: [Self; 3] = [Self::Listed, Self::Reversed, Self::ByName];

    fn compare(self, one: &Next, other: &Next) -> std::cmp::Ordering {
        match self {
            Self::Listed => one.at.cmp(&other.at),
            Self::Reversed => other.at.cmp(&one.at),
            Self::ByName => one.name.cmp(&other.name),
        }
    }
}

impl Level {
    fn new(dir: NodeId, order: Order) -> Self {
        let next = VecDeque::new();
        Self { dir, shown: 0, next, order, arranged: true, steps: 0, read: 0, deeper: false }
    }

    /// Puts what is to come in the order that it is thought to come in.
    fn arrange(&mut self) {
        if !std::mem::replace(&mut self.arranged, true) {
            let order = self.order;
            self.next.make_contiguous().sort_unstable_by(|one, other| order.compare(one, other));
            self.read = 0;
            self.deeper = false;
        }
    }

    /// Tells whether a directory that is to come was read ahead.
    fn has_read(&self, ino: u64) -> bool {
        self.next.iter().take(self.read).any(|next| next.ino == ino)
    }

    /// Notes that a directory is listed now; tells whether it is one of those to come, in an order that is known.
    fn comes(&mut self, ino: u64) -> bool {
        if !self.next.iter().any(|next| next.ino == ino) {
            return false;
        }
        let is_first = |order: &Order| {
            let first = self.next.iter().min_by(|one, other| order.compare(one, other));
            first.is_some_and(|first| first.ino == ino)
        };
        // The first few tell the order; most go as they went above.
        if self.steps < STEPS_TELLING && !is_first(&self.order) {
            match Order::ALL.into_iter().find(is_first) {
                Some(order) => (self.order, self.arranged) = (order, false),
                None if self.steps == 0 => return false,
                // Some are left out.
                None => {}
            }
        }
        self.arrange();
        self.steps += 1;
        let at = self.next.iter().position(|next| next.ino == ino).unwrap_or_default();
        self.next.drain(..=at);
        self.read = self.read.saturating_sub(at + 1);
        self.deeper &= self.read > 0;
        true
    }
}

/// What a directory shows, looked up ahead.
#[derive(Debug)]
pub(super) struct Ready {
    dir: NodeId,
    ino: u64,
    /// In the order of its listing.
    found: Vec<FoundAhead>,
    /// Parts of directories among that.
    parts: usize,
    /// How much of it was of use.
    used: AtomicUsize,
}

#[derive(Debug)]
struct FoundAhead {
    /// Its number in the listing.
    number: u64,
    name: Name,
    found: Found,
}

impl Ready {
    fn new(dir: NodeId, ino: u64) -> Self {
        Self { dir, ino, found: Vec::new(), parts: 0, used: AtomicUsize::new(0) }
    }

    /// Returns what lies under a name of the listing. What a lower layer has there stays, as long as the upper has
    /// nothing; numbers begin anew when a listing is read again.
    pub(super) fn find(&self, number: u64, child: &Child<'_>) -> Option<&Found> {
        let at = self.found.binary_search_by_key(&number, |ahead| ahead.number).ok()?;
        let ahead = self.found.get(at)?;
        let is_it = *ahead.name == *child.name && ahead.found.layer == child.top;
        self.used.fetch_add(usize::from(is_it), Ordering::Relaxed);
        is_it.then_some(&ahead.found)
    }
}

impl Walk {
    /// Notes that the listing of a directory begins: what is ready of it is to be shown. Returns what need not be kept
    /// any more.
    fn begin(&mut self, dir: NodeId, ino: u64) -> (Vec<Ready>, Option<Arc<Ready>>) {
        let shown = self.current.take();
        if let Some(shown) = &shown {
            self.learn(shown.used.load(Ordering::Relaxed), shown.found.len());
        }
        let at = self.ready.iter().position(|ready| ready.dir == dir);
        self.current = at.map(|at| Arc::new(self.ready.remove(at)));
        if let Some(again) = self.levels.iter().position(|level| level.dir == dir) {
            self.levels.truncate(again);
        } else if let Some(level) = (0..self.levels.len()).rev().find(|n| self.comes_in(*n, ino)) {
            self.levels.truncate(level + 1);
            // Who lists the same two again and again uses nothing.
            if self.foreseen == 0 || self.current.is_some() {
                self.foreseen += 1;
            }
        } else {
            self.levels.clear();
            self.foreseen = 0;
        }
        let order = self.levels.last().map(|level| level.order).unwrap_or_default();
        if self.levels.len() == LEVELS_MAX {
            self.levels.remove(0);
        }
        self.levels.push(Level::new(dir, order));
        let is_to_come = |ready: &Ready| self.levels.iter().any(|level| level.has_read(ready.ino));
        let all = std::mem::take(&mut self.ready).into_iter();
        let (kept, passed) = all.partition(is_to_come);
        self.ready = kept;
        (passed, shown)
    }

    /// Looks up little more of the next directories than was of use, or more where all was.
    fn learn(&mut self, used: usize, ready: usize) {
        if used < ready {
            self.each = (used + used / 8).max(OBJECTS_AT_ONCE);
        } else if used >= self.each {
            self.each = (2 * self.each).min(OBJECTS_EACH);
        }
    }

    fn comes_in(&mut self, level: usize, ino: u64) -> bool {
        self.levels.get_mut(level).is_some_and(|level| level.comes(ino))
    }

    /// Notes that the listing of a directory showed these directories, and whether it is at its end; tells whether there
    /// is something to read ahead.
    fn showed(&mut self, dir: NodeId, dirs: Vec<(u64, Name)>, at_end: bool) -> bool {
        let known: usize = self.levels.iter().map(|level| level.next.len()).sum();
        if let Some(level) = self.levels.iter_mut().find(|level| level.dir == dir) {
            level.arranged &= dirs.is_empty();
            for (ino, name) in dirs.into_iter().take(NEXT_MAX.saturating_sub(known)) {
                level.next.push_back(Next { ino, at: level.shown, name });
                level.shown += 1;
            }
        }
        self.foreseen > 0 && at_end
    }

    /// Returns the number of the directory to be read next, unless as many parts as may be are open.
    fn next(&mut self, parts_max: usize) -> Option<u64> {
        let (found, parts) = self
            .ready
            .iter()
            .fold((0, 0), |(found, parts), ready| (found + ready.found.len(), parts + ready.parts));
        let read: usize = self.levels.iter().map(|level| level.read).sum();
        let read = read.max(self.ready.len());
        let dirs_max = DIRS_MAX.min(2 * self.foreseen);
        if read >= dirs_max || found >= OBJECTS_MAX || parts >= parts_max {
            return None;
        }
        for level in self.levels.iter_mut().rev() {
            level.arrange();
            if level.deeper {
                return None;
            }
            while let Some(next) = level.next.get(level.read) {
                level.read += 1;
                if !self.ready.iter().any(|ready| ready.ino == next.ino) {
                    return Some(next.ino);
                }
            }
        }
        None
    }

    /// Keeps what was read of a directory, beside what is ready of it, if it is still to come. Returns what need not be
    /// kept.
    fn keep(&mut self, read: Ready, has_dirs: bool) -> Option<Ready> {
        let Some(level) = self.levels.iter_mut().find(|level| level.has_read(read.ino)) else {
            return Some(read);
        };
        level.deeper |= has_dirs;
        match self.ready.iter_mut().find(|ready| ready.dir == read.dir) {
            Some(ready) => {
                ready.parts += read.parts;
                ready.found.extend(read.found);
            }
            None => self.ready.push(read),
        }
        None
    }
}

impl Ahead {
    /// Returns what is ready of a directory that is listed, and notes it where the listing begins.
    pub(super) fn ready(&self, node: &Node, offset: u64) -> Option<Arc<Ready>> {
        if !self.used.load(Ordering::Relaxed) {
            return None;
        }
        let mut walk = self.walk.lock();
        let mut passed = None;
        if offset == 0 {
            passed = Some(walk.begin(node.id, node.ino));
            let reading = self.reading.load(Ordering::Relaxed);
            if !walk.levels.iter().any(|level| level.has_read(reading)) {
                self.reading.store(NOTHING, Ordering::Relaxed);
            }
        }
        let shown = walk.current.clone().filter(|shown| shown.dir == node.id);
        drop(walk);
        // Not with the walk locked, as that closes handles.
        drop(passed);
        shown
    }

    /// Notes that the listing of a directory showed directories, by number and name, and whether it is at its end.
    pub(super) fn showed(&self, node: &Node, dirs: Vec<(u64, Name)>, at_end: bool) {
        if self.used.load(Ordering::Relaxed) && self.walk.lock().showed(node.id, dirs, at_end) {
            self.due.store(true, Ordering::Release);
        }
    }

    /// Returns the number of the directory to be read next, and how many objects of it.
    fn next(&self, parts_max: usize) -> Option<(u64, usize)> {
        let mut walk = self.walk.lock();
        // Before, so that whoever changes what is seen here sets it anew; the next answer picks that up at the latest.
        self.due.store(false, Ordering::Release);
        let next = walk.next(parts_max);
        self.reading.store(next.unwrap_or(NOTHING), Ordering::Relaxed);
        next.map(|ino| (ino, walk.each))
    }

    /// Gives all up: nobody walks any more.
    fn end(&self) {
        let mut walk = self.walk.lock();
        self.reading.store(NOTHING, Ordering::Relaxed);
        let ended = std::mem::take(&mut *walk);
        drop(walk);
        drop(ended);
    }
}

impl Union {
    /// Reads directories that a walk will ask for next, if there are any. To be called, after each answer, by a thread that
    /// nobody waits for; costs nothing where there is nothing to do.
    pub fn read_ahead(&self) {
        let ahead = &self.ahead;
        if !ahead.due.load(Ordering::Acquire) {
            if !ahead.used.load(Ordering::Relaxed) {
                ahead.used.store(true, Ordering::Relaxed);
            }
            return;
        }
        let Some(_reader) = ahead.reader.try_lock() else { return };
        // A share of the handles that are kept, so that those read first are still open when they are used.
        let parts_max = self.handles.bound() / 4 * 3;
        // Not for as long as the walk goes on: the thread is to serve as well.
        for _ in 0..DIRS_MAX {
            let Some((ino, objects)) = ahead.next(parts_max) else { return };
            if let Err(error) = self.read_directory(ino, objects, parts_max) {
                // Whoever lists it is told.
                tracing::debug!(%error, "not read ahead");
            }
        }
        ahead.due.store(true, Ordering::Release);
    }

    /// Ends what [`Union::read_ahead`] does in another thread.
    pub fn end_reading_ahead(&self) {
        self.ahead.end();
    }

    fn read_directory(&self, ino: u64, objects: usize, parts_max: usize) -> Result<()> {
        let Some(pin) = self.pin_by_number(ino) else { return Ok(()) };
        let dir = lock::directory(&pin.node)?;
        let listed = self.listed.load(Ordering::Relaxed);
        if pin.node.place.read().gone || listed > super::LISTED_MAX / 2 {
            return Ok(());
        }
        let (mut first, mut left, mut parts) = (0, objects, 0);
        while left > 0 && parts < parts_max {
            let names = self.names_up_to(dir, NAMES_MAX)?;
            let Some(listing) = &names.listing else { return Ok(()) };
            let mut read = Ready::new(pin.node.id, ino);
            let (mut seen, mut has_dirs) = (0, false);
            for (number, child) in listing.children_from(first).take(OBJECTS_AT_ONCE.min(left)) {
                // Whoever lists it now looks it up as well.
                if self.ahead.reading.load(Ordering::Relaxed) != ino {
                    return Ok(());
                }
                if parts + read.parts >= parts_max {
                    break;
                }
                first = number + 1;
                seen += 1;
                has_dirs |= child.kind == FileType::Directory;
                if child.top != UPPER
                    && let Ok(Some(found)) = self.find_child(dir, &child)
                {
                    read.parts += child.parts.len();
                    read.found.push(FoundAhead { number, name: child.name.into(), found });
                }
            }
            left = if seen < OBJECTS_AT_ONCE { 0 } else { left - seen };
            parts += read.parts;
            if left == 0 || parts >= parts_max {
                let is_dir = |(_, child): (u64, Child<'_>)| child.kind == FileType::Directory;
                has_dirs |= listing.children_from(first).any(is_dir);
            }
            let unused = self.ahead.walk.lock().keep(read, has_dirs);
            drop(names);
            drop(unused);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::Permissions;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::idmap::OuterId;
    use crate::union::{Caller, DirEntry, Entry, LayerSpec, RenameFlags, SetAttr, Visit};

    const TOP: NodeId = NodeId(100);

    /// A walk that has listed a directory with these directories in it; their numbers are their positions.
    fn walk(names: &[&str]) -> Walk {
        let mut walk = Walk::default();
        list(&mut walk, TOP, 100, names, 0);
        walk
    }

    fn list(walk: &mut Walk, dir: NodeId, ino: u64, names: &[&str], first: u64) -> bool {
        walk.begin(dir, ino);
        let dirs = names.iter().zip(first..);
        walk.showed(dir, dirs.map(|(name, ino)| (ino, name.as_bytes().into())).collect(), false);
        walk.showed(dir, Vec::new(), true)
    }

    /// Reads ahead as far as that goes.
    fn read(walk: &mut Walk, has_dirs: bool) -> Vec<u64> {
        let next = || {
            let ino = walk.next(1000)?;
            assert!(walk.keep(Ready::new(NodeId(ino), ino), has_dirs).is_none());
            Some(ino)
        };
        std::iter::from_fn(next).collect()
    }

    fn shown(walk: &Walk) -> Option<u64> {
        walk.current.as_ref().map(|ready| ready.ino)
    }

    fn step(walk: &mut Walk, ino: u64) -> bool {
        list(walk, NodeId(ino), ino, &[], 0)
    }

    #[test]
    fn the_first_directory_tells_the_order() {
        let names = ["m", "z", "a", "k"];
        for (order, foreseen) in [
            ([0, 1, 2, 3], true),
            ([3, 2, 1, 0], true),
            ([2, 3, 0, 1], true),
            ([1, 0, 3, 2], false),
        ] {
            let mut walk = walk(&names);
            assert!(read(&mut walk, false).is_empty(), "nobody walks yet");
            assert_eq!(step(&mut walk, order[0]), foreseen, "{order:?}");
            // Two after the first.
            let expected = if foreseen { &order[1..3] } else { &[] };
            assert_eq!(read(&mut walk, false), expected);
        }
    }

    #[test]
    fn the_second_corrects_the_first() {
        let mut walk = walk(&["a", "z", "m", "k"]);
        step(&mut walk, 0);
        assert_eq!(read(&mut walk, false), [1, 2]);
        assert!(step(&mut walk, 3));
        assert_eq!(read(&mut walk, false), [2, 1]);
    }

    #[test]
    fn no_more_is_read_than_is_used() {
        let names = ["a"; 30];
        let mut walk = walk(&names);
        let mut dirs = 0..;
        for expected in [&[1, 2][..], &[3, 4, 5], &[6, 7, 8], &[9, 10, 11], &[12]] {
            let ino = dirs.next().unwrap();
            let (passed, _) = walk.begin(NodeId(ino), ino);
            assert_eq!((shown(&walk), passed.len()), ((ino > 0).then_some(ino), 0));
            assert_eq!(read(&mut walk, false), expected);
        }
        // Some are passed by.
        let (passed, _) = walk.begin(NodeId(7), 7);
        assert_eq!((shown(&walk), passed.len()), (Some(7), 2));
        assert_eq!(read(&mut walk, false), [13, 14, 15]);
        // Something else altogether.
        let (passed, _) = walk.begin(NodeId(77), 77);
        assert!(shown(&walk).is_none() && passed.len() == DIRS_MAX);
        assert!(read(&mut walk, false).is_empty());
    }

    #[test]
    fn a_walk_that_uses_nothing_gets_no_more() {
        let names = ["a"; 30];
        let mut walk = walk(&names);
        for _ in 0..9 {
            list(&mut walk, TOP, 100, &names, 0);
            assert!(step(&mut walk, 0));
            assert_eq!(read(&mut walk, false), [1, 2]);
        }
    }

    #[test]
    fn a_deep_walk_remembers_the_innermost() {
        let mut walk = Walk::default();
        for depth in 0..1000 {
            let dir = NodeId(depth);
            list(&mut walk, dir, depth, &["a", "b"], depth + 1);
        }
        assert_eq!(walk.levels.len(), LEVELS_MAX);
        assert!(step(&mut walk, 1001));
    }

    #[test]
    fn as_much_is_looked_up_as_is_of_use() {
        let mut walk = walk(&[]);
        let mut shows = |ready, used| {
            walk.learn(used, ready);
            walk.each
        };
        assert_eq!(shows(10, 10), OBJECTS_FIRST);
        assert_eq!(shows(208, 208), 416);
        assert_eq!(shows(416, 416), OBJECTS_EACH);
        assert_eq!(shows(512, 184), 207);
        assert_eq!(shows(207, 184), 207);
        assert_eq!(shows(207, 25), 28);
        assert_eq!(shows(28, 0), OBJECTS_AT_ONCE);
    }

    #[test]
    fn what_lies_deeper_comes_first() {
        let mut walk = walk(&["a", "b", "c"]);
        list(&mut walk, NodeId(0), 0, &["d", "e"], 10);
        // As many as there are in the directory listed last, and one beside it.
        assert_eq!(read(&mut walk, true), [10]);
        list(&mut walk, NodeId(10), 10, &[], 0);
        assert_eq!(read(&mut walk, true), [11]);
        list(&mut walk, NodeId(11), 11, &[], 0);
        assert_eq!(read(&mut walk, true), [1]);
        assert!(read(&mut walk, true).is_empty());
        assert!(step(&mut walk, 1));
        assert_eq!(read(&mut walk, true), [2]);
        // Listed once more.
        assert!(step(&mut walk, 1));
        assert!(step(&mut walk, 2));
    }

    type Shown = BTreeMap<String, (u32, u64)>;

    /// Lists a directory to its end: its directories in order, and mode and size by name.
    fn list_all(union: &Union, dir: NodeId) -> (Vec<NodeId>, Shown) {
        let (mut dirs, mut shown, mut offset, mut before) = (Vec::new(), Shown::new(), 0, None);
        while before != Some(offset) {
            before = Some(offset);
            let visit = &mut |listed: DirEntry<'_>, entry: Option<&Entry>| {
                offset = listed.offset;
                if let Some(Entry { node, attr }) = entry {
                    dirs.extend((listed.kind == FileType::Directory).then_some(*node));
                    let name = String::from_utf8_lossy(listed.name).into_owned();
                    shown.insert(name, (attr.mode & 0o7777, attr.size));
                }
                Visit::Taken
            };
            union.readdirplus(dir, before.unwrap_or_default(), visit).unwrap();
        }
        (dirs, shown)
    }

    // What is read ahead is read before whatever happens until it is shown.
    #[test]
    fn what_changes_after_it_was_read_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let union = super::super::testing::open_in(dir.path(), |config| {
            for layer in ["l", "l2"] {
                for sub in 0..4 {
                    let path = dir.path().join(layer).join(format!("top/d{sub}"));
                    std::fs::create_dir_all(path.join("s")).unwrap();
                    for name in ["gone", "changed", "moved", "target", "grown", "same"] {
                        let path = path.join(name);
                        std::fs::File::create(&path).unwrap().write_all(b"x").unwrap();
                        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
                    }
                }
            }
            let open = std::fs::File::open(dir.path().join("l2")).unwrap().into();
            config.lowers.push(LayerSpec { dir: open, path: "l2".into() });
        });
        union.read_ahead();
        let top = union.lookup(NodeId::ROOT, b"top").unwrap().unwrap().node;
        let (dirs, _) = list_all(&union, top);
        let (_, before) = list_all(&union, dirs[0]);
        union.read_ahead();
        let next = dirs[1];
        let is_ready = || union.ahead.walk.lock().ready.iter().any(|ready| ready.dir == next);
        assert!(is_ready());

        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let caller = Caller { uid: OuterId::asked(uid), gid: OuterId::asked(gid), umask: 0 };
        let find =
            |parent, name: &str| union.lookup(parent, name.as_bytes()).unwrap().unwrap().node;
        union.unlink(next, b"gone").unwrap();
        union.mknod(&caller, next, b"new", libc::S_IFREG | 0o600, (0, 0)).unwrap();
        let mode = SetAttr { mode: Some(0o400), ..SetAttr::default() };
        union.setattr(find(next, "changed"), &mode).unwrap();
        union.rename(next, b"moved", next, b"target", RenameFlags::empty()).unwrap();
        let size = SetAttr { size: Some(77), ..SetAttr::default() };
        union.setattr(find(next, "grown"), &size).unwrap();
        union.mkdir(&caller, find(next, "s"), b"below", 0o700).unwrap();
        assert!(is_ready());

        let (subdirs, shown) = list_all(&union, next);
        assert!(!is_ready());
        let mut expected = before;
        for name in ["gone", "moved"] {
            expected.remove(name);
        }
        expected.insert("new".into(), (0o600, 0));
        expected.insert("changed".into(), (0o400, 1));
        expected.insert("grown".into(), (0o644, 77));
        // Of a directory its filesystem tells the size.
        expected.insert("s".into(), shown["s"]);
        assert_eq!(shown, expected);
        let (_, below) = list_all(&union, subdirs[0]);
        assert_eq!(below.keys().collect::<Vec<_>>(), ["below"]);
    }

    // What is in no listing yet is read as far as is worth it, and not at all once the mount is gone.
    #[test]
    fn what_nobody_asked_for_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l/top");
        for sub in ["a", "b", "c", "d"] {
            std::fs::create_dir_all(path.join(sub)).unwrap();
        }
        // As many files, in the order of the listing.
        let subs = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
        for (sub, count) in subs.zip([1, NAMES_MAX + 1, 300, 1]) {
            std::fs::File::create(sub.join("0")).unwrap();
            for name in 1..count {
                std::fs::hard_link(sub.join("0"), sub.join(name.to_string())).unwrap();
            }
        }
        let union = super::super::testing::open_in(dir.path(), |_| ());
        union.read_ahead();
        let top = union.lookup(NodeId::ROOT, b"top").unwrap().unwrap().node;
        let (dirs, _) = list_all(&union, top);
        let is_listed = |dir: NodeId| {
            union.node(dir).unwrap().dir.as_ref().unwrap().names.read().listing.is_some()
        };
        let ready = |dir: NodeId| {
            let walk = union.ahead.walk.lock();
            walk.ready.iter().find(|ready| ready.dir == dir).map(|ready| ready.found.len())
        };
        list_all(&union, dirs[0]);
        union.read_ahead();
        assert_eq!((ready(dirs[1]), is_listed(dirs[1])), (None, false), "too many names");
        assert_eq!((ready(dirs[2]), is_listed(dirs[2])), (Some(OBJECTS_FIRST), true));

        list_all(&union, dirs[2]);
        union.end_reading_ahead();
        union.read_ahead();
        assert_eq!((ready(dirs[3]), is_listed(dirs[3])), (None, false), "nobody is there any more");
    }

    // A listing that is read again numbers its names anew.
    #[test]
    fn numbers_of_another_listing_are_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l/top");
        for sub in ["a", "b"] {
            std::fs::create_dir_all(path.join(sub)).unwrap();
            for name in 0..20 {
                let file = std::fs::File::create(path.join(sub).join(format!("f{name}"))).unwrap();
                file.set_len(name).unwrap();
            }
        }
        let union = super::super::testing::open_in(dir.path(), |_| ());
        union.read_ahead();
        let top = union.lookup(NodeId::ROOT, b"top").unwrap().unwrap().node;
        let (dirs, _) = list_all(&union, top);
        let (_, mut expected) = list_all(&union, dirs[0]);
        union.read_ahead();
        let node = union.node(dirs[1]).unwrap();
        assert!(union.ahead.walk.lock().ready.iter().any(|ready| ready.dir == node.id));
        union.unlink(node.id, b"f3").unwrap();
        expected.remove("f3");
        union.distrust(&mut node.dir.as_ref().unwrap().names.write());
        assert_eq!(list_all(&union, node.id).1, expected);
    }
}
