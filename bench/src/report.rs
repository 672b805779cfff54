//! Medians, ratios and plots of what was measured.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::control::Counts;
use crate::peer::{LEAST, OVER_KERNEL, Peer};
use crate::scenario::{Sample, Scenario};

/// All samples of a run.
pub struct Report {
    mode: String,
    rounds: usize,
    peers: Vec<String>,
    /// By step, in the order they were measured.
    rows: Vec<Row>,
    failures: Vec<String>,
}

#[derive(Default)]
struct Row {
    name: String,
    samples: BTreeMap<String, Vec<Sample>>,
    requests: BTreeMap<String, Counts>,
}

/// What a table shows of a sample.
type Value = fn(&Sample) -> f64;

impl Report {
    /// An empty one.
    pub fn new(mode: &str, peers: &[Peer], rounds: usize) -> Report {
        let peers = peers.iter().map(|peer| peer.name.clone()).collect();
        Report { mode: mode.into(), rounds, peers, rows: Vec::new(), failures: Vec::new() }
    }

    /// Takes the samples of one run.
    pub fn add(&mut self, scenario: &Scenario, peer: &Peer, samples: Vec<Sample>) {
        for (name, sample) in scenario.names().into_iter().zip(samples) {
            let row = row(&mut self.rows, &name);
            let first = row.samples.values().flatten().next();
            if let Some(other) = first.filter(|other| other.check != sample.check) {
                let text =
                    format!("{name}: {} gives {}, others {}", peer.name, sample.check, other.check);
                eprintln!("WRONG RESULT {text}");
                self.failures.push(format!("wrong result: {text}"));
            }
            row.samples.entry(peer.name.clone()).or_default().push(sample);
        }
    }

    /// Takes the requests of one run.
    pub fn count(&mut self, scenario: &Scenario, peer: &Peer, samples: Vec<Sample>) {
        for (name, sample) in scenario.names().iter().zip(samples) {
            row(&mut self.rows, name).requests.insert(peer.name.clone(), sample.requests);
        }
    }

    /// Takes note of a run that did not end.
    pub fn failed(&mut self, scenario: &Scenario, peer: &Peer, text: &str) {
        eprintln!("FAILED {} by {}: {text}", scenario.name, peer.name);
        self.failures.push(format!("{} by {}: {text}", scenario.name, peer.name));
    }

    /// Prints the rows of a scenario, as ratios to kernel overlay.
    pub fn print(&self, scenario: &Scenario) {
        let names = scenario.names();
        for row in self.rows.iter().filter(|row| names.contains(&row.name)) {
            let mut line = format!("{:24}", row.name);
            let base = row.median("kernel", seconds);
            for peer in &self.peers {
                let Some(median) = row.median(peer, seconds) else { continue };
                let ratio = base.map_or(String::new(), |base| format!(" ({:.2})", median / base));
                let _ = write!(line, "  {peer} {}{ratio}", show_seconds(median));
            }
            println!("{line}");
        }
    }

    /// Writes a table and a plot to `out`.
    ///
    /// # Errors
    /// If a file cannot be written, or a peer failed or gave a wrong result.
    pub fn write(&self, out: &Path) -> Result<(), String> {
        let put = |name: String, text: String| {
            let path = out.join(name);
            fs::create_dir_all(out)
                .and_then(|()| fs::write(&path, text))
                .map_err(|e| format!("{}: {e}", path.display()))
        };
        put(format!("{}.md", self.mode), self.markdown())?;
        put(format!("{}.svg", self.mode), self.plot())?;
        // Only what is ours to answer for is an error of the run.
        match self.failures.iter().find(|text| text.contains("lamina")) {
            Some(text) => Err(text.clone()),
            None => Ok(()),
        }
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "# {}: {} rounds, interleaved\n\nTime in multiples of kernel overlay's: median (least-most). \
             Lower is better. Who takes more than a minute for a scenario is not timed again.\n\n",
            self.mode, self.rounds
        );
        if self.peers.iter().any(|peer| peer == LEAST) {
            text += "`least` is a server that answers from its own memory, so its time is what FUSE itself costs with \
                     this kernel and `native`'s what the work beneath costs in any case: the first alone, and the sum \
                     of both but for what the program does by itself, which both have, are bounds for any server. Its mounts \
                     load the layers, and it keeps memory for large files: neither means anything.\n\n";
        }
        if self.peers.iter().any(|peer| peer == OVER_KERNEL) {
            text += "`over-kernel` is kernel overlayfs asked over FUSE: lamina with a mount of it as its upper. What it takes \
                     is what the kernel's own work takes in a server's hands.\n\n";
        }
        self.table(&mut text, |row, peer| {
            let base = row.median("kernel", seconds)?;
            let all = row.sorted(peer, seconds);
            let (least, most) = (all.first()?, all.last()?);
            let median = row.median(peer, seconds)?;
            if peer == "kernel" {
                return Some(show_seconds(median));
            }
            Some(format!("{:.2} ({:.2}-{:.2})", median / base, least / base, most / base))
        });
        text += "\nRequests to the server.\n\n";
        self.table(&mut text, |row, peer| {
            let requests = row.requests.get(peer)?;
            if requests.is_empty() {
                return None;
            }
            let mut most: Vec<_> = requests.iter().collect();
            most.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            let words =
                most.iter().take(3).map(|(name, count)| format!("{} {count}", name.to_lowercase()));
            Some(format!(
                "{}: {}",
                requests.values().sum::<u64>(),
                words.collect::<Vec<_>>().join(", ")
            ))
        });
        text += "\nProcessor time of client and server, and of the server alone, seconds.\n\n";
        self.table(&mut text, |row, peer| {
            let both = row.median(peer, |sample| (sample.client + sample.server).as_secs_f64())?;
            match row.median(peer, |sample| sample.server.as_secs_f64())? {
                0.0 => Some(format!("{both:.3}")),
                server => Some(format!("{both:.3} ({server:.3})")),
            }
        });
        text += "\nPeak memory of the server, MiB.\n\n";
        self.table(&mut text, |row, peer| {
            let most = row.median(peer, |sample| sample.memory as f64)?;
            (most > 0.0).then(|| format!("{:.0}", most / f64::from(1 << 20)))
        });
        if !self.failures.is_empty() {
            text += "\nFailures and wrong results:\n\n";
            self.failures.iter().for_each(|failure| text += &format!("- {failure}\n"));
        }
        text
    }

    fn table(&self, text: &mut String, cell: impl Fn(&Row, &str) -> Option<String>) {
        let _ = writeln!(text, "| | {} |", self.peers.join(" | "));
        let _ = writeln!(text, "|---|{}", "---|".repeat(self.peers.len()));
        for row in &self.rows {
            let cells: Vec<String> =
                self.peers.iter().map(|peer| cell(row, peer).unwrap_or_default()).collect();
            if cells.iter().any(|cell| !cell.is_empty()) {
                let _ = writeln!(text, "| {} | {} |", row.name, cells.join(" | "));
            }
        }
    }

    /// Bars of time against the kernel's, on a logarithmic scale from a tenth to a hundred times.
    fn plot(&self) -> String {
        const COLOURS: [&str; 5] = ["#888888", "#3366cc", "#dd8800", "#aa3333", "#44aa55"];
        const BAR: f64 = 7.0;
        let shown: Vec<(usize, &String)> =
            self.peers.iter().enumerate().filter(|(_, peer)| *peer != "kernel").collect();
        let row_height = BAR * shown.len() as f64 + 8.0;
        let height = 60.0 + row_height * self.rows.len() as f64;
        let x = |ratio: f64| 180.0 + 200.0 * (ratio.clamp(0.1, 100.0).log10() + 1.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"800\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        for (n, (colour, peer)) in shown.iter().enumerate() {
            let left = 180 + n * 130;
            let fill = COLOURS.get(colour % COLOURS.len()).copied().unwrap_or("black");
            let _ = writeln!(
                svg,
                "<rect x=\"{left}\" y=\"8\" width=\"10\" height=\"10\" fill=\"{fill}\"/>\
                 <text x=\"{}\" y=\"17\">{peer}</text>",
                left + 14
            );
        }
        for mark in [0.1, 1.0, 10.0, 100.0] {
            let at = x(mark);
            let _ = writeln!(
                svg,
                "<line x1=\"{at}\" x2=\"{at}\" y1=\"40\" y2=\"{height}\" stroke=\"#cccccc\"/>\
                 <text x=\"{at}\" y=\"36\" text-anchor=\"middle\">{mark}</text>"
            );
        }
        for (n, row) in self.rows.iter().enumerate() {
            let top = 46.0 + row_height * n as f64;
            let _ = writeln!(
                svg,
                "<text x=\"174\" y=\"{}\" text-anchor=\"end\">{}</text>",
                top + 12.0,
                row.name
            );
            let Some(base) = row.median("kernel", seconds) else { continue };
            for (line, (colour, peer)) in shown.iter().enumerate() {
                let Some(median) = row.median(peer, seconds) else { continue };
                let (one, end) = (x(1.0), x(median / base));
                let fill = COLOURS.get(colour % COLOURS.len()).copied().unwrap_or("black");
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{fill}\"/>",
                    one.min(end),
                    top + BAR * line as f64,
                    (one - end).abs().max(1.0),
                    BAR - 1.0
                );
            }
        }
        svg + "</svg>\n"
    }
}

/// The row of a step, made where it is missing.
fn row<'a>(rows: &'a mut Vec<Row>, name: &str) -> &'a mut Row {
    let at = rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
        rows.push(Row { name: name.into(), ..Row::default() });
        rows.len() - 1
    });
    &mut rows[at]
}

impl Row {
    fn sorted(&self, peer: &str, value: Value) -> Vec<f64> {
        let mut all: Vec<f64> = self.samples.get(peer).into_iter().flatten().map(value).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    fn median(&self, peer: &str, value: Value) -> Option<f64> {
        let all = self.sorted(peer, value);
        all.get(all.len() / 2).copied()
    }
}

fn seconds(sample: &Sample) -> f64 {
    sample.time.as_secs_f64().max(1e-6)
}

fn show_seconds(seconds: f64) -> String {
    match Duration::from_secs_f64(seconds) {
        time if time < Duration::from_millis(10) => format!("{:.2} ms", seconds * 1e3),
        time if time < Duration::from_secs(1) => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}
