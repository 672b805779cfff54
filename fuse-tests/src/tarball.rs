//! Archives made byte by byte, so that they can hold what no honest writer puts into one.

/// An archive under construction.
#[derive(Clone, Debug, Default)]
pub struct Tar(Vec<u8>);

/// One header and its data.
#[derive(Clone, Debug)]
pub struct Item {
    name: Vec<u8>,
    link: Vec<u8>,
    flag: u8,
    mode: u32,
    owner: (u32, u32),
    mtime: u64,
    device: (u32, u32),
    data: Vec<u8>,
    size: Option<Vec<u8>>,
    gnu: bool,
    patch: Vec<(usize, Vec<u8>)>,
}

impl Item {
    /// An entry of any type.
    pub fn new(flag: u8, name: impl AsRef<[u8]>) -> Item {
        Item {
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            flag,
            mode: if flag == b'5' { 0o755 } else { 0o644 },
            owner: (0, 0),
            mtime: 1_600_000_000,
            device: (0, 0),
            data: Vec::new(),
            size: None,
            gnu: false,
            patch: Vec::new(),
        }
    }

    /// A regular file.
    pub fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
        Item::new(b'0', name).data(data)
    }

    /// A directory.
    pub fn dir(name: impl AsRef<[u8]>) -> Item {
        Item::new(b'5', name)
    }

    /// A symlink.
    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item::new(b'2', name).link(target)
    }

    /// A hard link.
    pub fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item::new(b'1', name).link(target)
    }

    /// Records for the next entry; a NUL-free key and any value each.
    pub fn pax(records: &[(&str, &[u8])]) -> Item {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let digits = (1..).find(|n| (rest + n).to_string().len() == *n).unwrap();
            data.extend_from_slice(format!("{} {key}=", rest + digits).as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        Item::new(b'x', "PaxHeaders/x").data(data)
    }

    /// Sets the link target.
    pub fn link(mut self, target: impl AsRef<[u8]>) -> Item {
        self.link = target.as_ref().to_vec();
        self
    }

    /// Sets the data.
    pub fn data(mut self, data: impl AsRef<[u8]>) -> Item {
        self.data = data.as_ref().to_vec();
        self
    }

    /// Sets the mode.
    pub fn mode(mut self, mode: u32) -> Item {
        self.mode = mode;
        self
    }

    /// Sets the owner.
    pub fn owner(mut self, uid: u32, gid: u32) -> Item {
        self.owner = (uid, gid);
        self
    }

    /// Sets the device number.
    pub fn device(mut self, major: u32, minor: u32) -> Item {
        self.device = (major, minor);
        self
    }

    /// Sets the twelve bytes of the size field, whatever the data.
    pub fn size(mut self, field: impl AsRef<[u8]>) -> Item {
        self.size = Some(field.as_ref().to_vec());
        self
    }

    /// Writes the header with GNU's magic.
    pub fn gnu(mut self) -> Item {
        self.gnu = true;
        self
    }

    /// Puts bytes anywhere in the header, before its sum is taken.
    pub fn patch(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Item {
        self.patch.push((at, bytes.as_ref().to_vec()));
        self
    }

    fn header(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.owner.0).as_bytes());
        put(116, format!("{:07o}", self.owner.1).as_bytes());
        let size = format!("{:011o}", self.data.len()).into_bytes();
        put(124, self.size.as_ref().unwrap_or(&size));
        put(136, format!("{:011o}", self.mtime).as_bytes());
        put(156, &[self.flag]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, if self.gnu { b"ustar  \0" } else { b"ustar\x0000" });
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        for (at, bytes) in &self.patch {
            put(*at, bytes);
        }
        put(148, b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }
}

impl Tar {
    /// An empty archive.
    pub fn new() -> Tar {
        Tar::default()
    }

    /// An archive of these entries, with its end.
    pub fn of(items: impl IntoIterator<Item = Item>) -> Vec<u8> {
        let mut tar = Tar::new();
        for item in items {
            tar.push(&item);
        }
        tar.end()
    }

    /// Appends an entry; a name or link longer than a header holds gets GNU's extra entry.
    pub fn push(&mut self, item: &Item) {
        for (flag, text) in [(b'L', &item.name), (b'K', &item.link)] {
            if text.len() > 100 {
                let long = Item::new(flag, "././@LongLink").data([text, &b"\0"[..]].concat()).gnu();
                self.push(&long);
            }
        }
        self.0.extend_from_slice(&item.header());
        self.raw(&item.data);
    }

    /// Appends bytes, filled up to a whole block.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    /// Appends the end and returns the bytes.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }

    /// Returns the bytes without an end.
    pub fn cut(self) -> Vec<u8> {
        self.0
    }
}
