//! What only root of the machine may do for a benchmark: drop caches, and count the requests of a FUSE connection by the
//! tracepoint that the kernel has for each. Who may not asks over a socket.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Requests of each kind, by the kernel's name.
pub type Counts = BTreeMap<String, u64>;

const EVENT: &str = "/sys/kernel/tracing/events/fuse/fuse_request_send";

/// Does it, or asks who can.
pub struct Control {
    socket: Option<Mutex<BufReader<UnixStream>>>,
}

impl Control {
    /// Does it itself, or over the socket at `path`.
    pub fn new(path: Option<PathBuf>) -> Result<Control, String> {
        let Some(path) = path else { return Ok(Control { socket: None }) };
        let socket =
            UnixStream::connect(&path).map_err(|e| format!("connect {}: {e}", path.display()))?;
        Ok(Control { socket: Some(Mutex::new(BufReader::new(socket))) })
    }

    /// Writes out what is dirty and forgets what is cached.
    pub fn drop_caches(&self) {
        self.ask("drop");
    }

    /// Counts the requests of the FUSE mount with this device number from now on.
    pub fn count(&self, device: u64) {
        self.ask(&format!("count {device}"));
    }

    /// What was counted.
    pub fn counted(&self) -> Counts {
        let text = self.ask("counted");
        let pair = |word: &str| {
            let (name, count) = word.split_once('=')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        text.split_whitespace().filter_map(pair).collect()
    }

    fn ask(&self, question: &str) -> String {
        let Some(socket) = &self.socket else { return answer(question) };
        let mut socket = socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut line = String::new();
        let asked = writeln!(socket.get_mut(), "{question}");
        if asked.and_then(|()| socket.read_line(&mut line)).is_err() {
            return String::new();
        }
        line
    }
}

fn answer(question: &str) -> String {
    let mut words = question.split_whitespace();
    match (words.next(), words.next().and_then(|word| word.parse().ok())) {
        (Some("drop"), _) => {
            rustix::fs::sync();
            // Without it cold runs are warm ones, which the figures show.
            let _ = fs::write("/proc/sys/vm/drop_caches", "3");
            String::new()
        }
        (Some("count"), Some(device)) => {
            let filter = format!("hist:keys=opcode if connection == {}", kernel_device(device));
            // Where there is no tracing nothing is counted, and the report says so.
            let _ = fs::write(Path::new(EVENT).join("trigger"), filter);
            String::new()
        }
        (Some("counted"), _) => {
            let event = Path::new(EVENT);
            let counts = counts(
                &fs::read_to_string(event.join("hist")).unwrap_or_default(),
                &fs::read_to_string(event.join("format")).unwrap_or_default(),
            );
            let triggers = fs::read_to_string(event.join("trigger")).unwrap_or_default();
            for line in triggers.lines().filter(|line| line.starts_with("hist:")) {
                let line = line.split(" [").next().unwrap_or(line);
                let _ = fs::write(event.join("trigger"), format!("!{line}"));
            }
            let words: Vec<String> =
                counts.iter().map(|(name, count)| format!("{name}={count}")).collect();
            words.join(" ")
        }
        _ => String::new(),
    }
}

/// The number that the kernel gives a device inside, of the one that stat(2) gives.
fn kernel_device(device: u64) -> u64 {
    u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device))
}

/// Reads a histogram by opcode, with the names that the format of the event has.
fn counts(hist: &str, format: &str) -> Counts {
    let names: BTreeMap<u32, &str> = format
        .split('{')
        .filter_map(|entry| {
            let (number, rest) = entry.split_once(", \"FUSE_")?;
            Some((number.trim().parse().ok()?, rest.split('"').next()?))
        })
        .collect();
    hist.lines()
        .filter_map(|line| {
            let (key, count) = line.strip_prefix("{ opcode:")?.split_once("} hitcount:")?;
            let opcode: u32 = key.trim().parse().ok()?;
            let name = names.get(&opcode).map_or_else(|| opcode.to_string(), |n| (*n).to_owned());
            Some((name, count.trim().parse().ok()?))
        })
        .collect()
}

/// Answers whoever connects to the socket at `path`, one after the other, until killed.
pub fn serve(path: Option<String>) -> Result<(), String> {
    let path = path.ok_or("--serve needs a path")?;
    let listener = UnixListener::bind(&path).map_err(|e| format!("bind {path}: {e}"))?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&path, everybody).map_err(|e| format!("chmod {path}: {e}"))?;
    for client in listener.incoming() {
        let client = client.map_err(|e| format!("accept: {e}"))?;
        let mut writer = client.try_clone().map_err(|e| format!("dup: {e}"))?;
        for line in BufReader::new(client).lines() {
            let Ok(line) = line else { break };
            if writeln!(writer, "{}", answer(&line)).is_err() {
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_reads_by_name() {
        let format = "print fmt: \"...\", {1, \"FUSE_LOOKUP\"}, {44, \"FUSE_READDIRPLUS\"}, x";
        let hist = "# event histogram\n{ opcode:          1 } hitcount:          4\n\
                    { opcode:         44 } hitcount:         11\n{ opcode: 99 } hitcount: 2\n\nTotals:\n    Hits: 17";
        let want = [("99", 2), ("LOOKUP", 4), ("READDIRPLUS", 11)];
        let got = counts(hist, format);
        assert_eq!(got, want.map(|(name, count)| (name.to_owned(), count)).into());
    }
}
