//! What only root of the machine may do for a benchmark: drop caches, and count the requests of a FUSE connection by the
//! tracepoint that the kernel has for them. Who may not asks over a socket.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Requests of each kind, by the kernel's name.
pub type Counts = BTreeMap<String, u64>;

/// A buffer of our own, so that nobody else's tracing is disturbed.
const TRACE: &str = "/sys/kernel/tracing/instances/lamina-bench";

/// Size of the buffer for each processor, KiB: about 800,000 requests.
const TRACE_KIB: &str = "32768";

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
            // Where there is no tracing nothing is counted, and the report has no table of it.
            let _ = trace(kernel_device(device));
            String::new()
        }
        (Some("counted"), _) => {
            let words: Vec<String> = traced()
                .unwrap_or_default()
                .iter()
                .map(|(name, count)| format!("{name}={count}"))
                .collect();
            words.join(" ")
        }
        _ => String::new(),
    }
}

/// The number that the kernel gives a device inside, of the one that stat(2) gives.
fn kernel_device(device: u64) -> u64 {
    u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device))
}

/// Begins to write down the requests to a FUSE connection.
fn trace(connection: u64) -> io::Result<()> {
    let dir = Path::new(TRACE);
    // One that a killed run left counts for another connection.
    let _ = fs::remove_dir(dir);
    fs::create_dir(dir)?;
    fs::write(dir.join("buffer_size_kb"), TRACE_KIB)?;
    let event = dir.join("events/fuse/fuse_request_send");
    fs::write(event.join("filter"), format!("connection == {connection}"))?;
    fs::write(event.join("enable"), "1")
}

/// Ends that, and returns what was written down.
fn traced() -> io::Result<Counts> {
    let dir = Path::new(TRACE);
    fs::write(dir.join("events/fuse/fuse_request_send/enable"), "0")?;
    let counts = counts(BufReader::new(fs::File::open(dir.join("trace"))?));
    fs::remove_dir(dir)?;
    counts
}

/// Counts the requests of a trace by name; what did not fit into the buffer is `LOST`.
fn counts(trace: impl BufRead) -> io::Result<Counts> {
    let mut counts = Counts::new();
    for line in trace.lines() {
        let line = line?;
        if let Some((_, rest)) = line.split_once("(FUSE_") {
            let name = rest.split(')').next().unwrap_or_default();
            *counts.entry(name.to_owned()).or_default() += 1;
        } else if let Some((_, rest)) = line.split_once("entries-in-buffer/entries-written: ") {
            let numbers = rest.split_whitespace().next().and_then(|text| text.split_once('/'));
            let lost = numbers.and_then(|(kept, written)| {
                written.parse::<u64>().ok()?.checked_sub(kept.parse().ok()?)
            });
            if let Some(lost) = lost.filter(|lost| *lost > 0) {
                counts.insert("LOST".into(), lost);
            }
        }
    }
    Ok(counts)
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
    fn a_trace_is_counted_by_name() {
        let trace = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 3/5   #P:2\n#\n\
            rm-7 [000] ...1. 1.0: fuse_request_send: connection 67 req 2 opcode 10 (FUSE_UNLINK) len 50\n\
            rm-7 [000] ...1. 1.1: fuse_request_send: connection 67 req 4 opcode 10 (FUSE_UNLINK) len 50\n\
            ls-8 [001] ...1. 1.2: fuse_request_send: connection 67 req 6 opcode 44 (FUSE_READDIRPLUS) len 80\n";
        let want = [("LOST", 2), ("READDIRPLUS", 1), ("UNLINK", 2)];
        let got = counts(trace.as_bytes()).unwrap();
        assert_eq!(got, want.map(|(name, count)| (name.to_owned(), count)).into());
    }
}
