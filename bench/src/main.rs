//! Runs the same work on lamina, kernel overlayfs, the bare filesystem and both fuse-overlayfs, interleaved in one run, and
//! prints how long each took, what it asked its server, and what the server cost. Started by `scripts/bench.sh`, which makes
//! the filesystem and installs the rivals. [`mod@least`] is a peer of its own, the limit of all servers.

mod control;
mod layers;
mod least;
mod peer;
mod report;
mod scenario;
mod steps;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use control::Control;
// For the files that are shared with lamina, which name these as their own.
use laminafs::{error, union};
use peer::Peer;
use report::Report;

/// What was asked for on the command line.
struct Arguments {
    /// A directory on the filesystem to measure on.
    at: PathBuf,
    /// One on a filesystem whose files can share blocks, for the scenarios that are about that.
    reflinks: Option<PathBuf>,
    /// Where reports go.
    out: PathBuf,
    /// Word in the names of the reports: `root` or `rootless`.
    mode: String,
    /// How often each scenario is run for each peer.
    rounds: usize,
    /// Divides the amounts of work.
    scale: usize,
    /// Scenarios whose name starts with one of these; empty is all.
    only: Vec<String>,
    peers: Vec<Peer>,
    /// Socket of the part of us that may drop caches and count requests.
    control: Option<PathBuf>,
}

const USAGE: &str = "\
Usage: lamina-bench --at DIR [--reflinks DIR] --out DIR --mode WORD [--rounds N] [--scale N] [--only NAME]...
                    [--peer NAME=PROGRAM[,OPTION;...] [--for NAME]...]... [--least [--for NAME]...]
                    [--over-kernel PROGRAM [--for NAME]...]
                    [--control SOCKET]
       lamina-bench --serve SOCKET
       lamina-bench --mount-least -o lowerdir=A:B,upperdir=C MERGED

DIR is on the filesystem to measure on; scenarios of shared blocks take the second one, if it is given.
Peers: native and kernel are always there; PROGRAM is a mount program, for scenarios of these NAMEs.
--least adds the least server there can be, which --mount-least is: a filesystem in its own memory.
--over-kernel adds PROGRAM with kernel overlayfs as its upper: the kernel's work, asked for over FUSE.
--serve answers on SOCKET for who may not drop caches or trace requests.
";

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        at: PathBuf::new(),
        reflinks: None,
        out: PathBuf::new(),
        mode: "root".into(),
        rounds: 3,
        scale: 1,
        only: Vec::new(),
        peers: vec![Peer::native(), Peer::kernel()],
        control: None,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        let number = |text: String| text.parse::<usize>().map_err(|e| format!("{text}: {e}"));
        match word.as_str() {
            "--at" => arguments.at = value()?.into(),
            "--reflinks" => arguments.reflinks = Some(value()?.into()),
            "--out" => arguments.out = value()?.into(),
            "--mode" => arguments.mode = value()?,
            "--rounds" => arguments.rounds = number(value()?)?.max(1),
            "--scale" => arguments.scale = number(value()?)?.max(1),
            "--only" => arguments.only.push(value()?),
            "--control" => arguments.control = Some(value()?.into()),
            "--peer" => {
                let text = value()?;
                let (name, program) = text.split_once('=').ok_or("--peer NAME=PROGRAM")?;
                let (program, options) = program.split_once(',').unwrap_or((program, ""));
                arguments.peers.push(Peer::program(name, program, options));
            }
            "--least" => arguments.peers.push(Peer::least()?),
            "--over-kernel" => arguments.peers.push(Peer::over_kernel(&value()?)),
            "--for" => {
                let last = arguments.peers.last_mut().ok_or("--for comes after --peer")?;
                last.only.push(value()?);
            }
            _ => return Err(format!("unknown argument {word}\n{USAGE}")),
        }
    }
    if arguments.at.as_os_str().is_empty() || arguments.out.as_os_str().is_empty() {
        return Err(USAGE.into());
    }
    Ok(arguments)
}

/// Who takes longer for a scenario is not timed again.
const LONG: Duration = Duration::from_secs(60);

fn run(arguments: Arguments) -> Result<(), String> {
    let control = Control::new(arguments.control)?;
    let is_wanted = |name: &str| {
        arguments.only.is_empty() || arguments.only.iter().any(|word| name.starts_with(&**word))
    };
    let mut report = Report::new(&arguments.mode, &arguments.peers, arguments.rounds);
    for scenario in scenario::all().into_iter().filter(|scenario| is_wanted(scenario.name)) {
        let at =
            if scenario.shares_blocks { arguments.reflinks.as_ref() } else { Some(&arguments.at) };
        let Some(at) = at else { continue };
        let mut long = vec![false; arguments.peers.len()];
        // In a round before the others, as it takes time.
        for round in 0..=arguments.rounds {
            // A different one is first each time, so that none always finds what another left warm.
            for n in 0..arguments.peers.len() {
                let index = (n + round) % arguments.peers.len();
                let peer = &arguments.peers[index];
                let is_counted = round == 0;
                let takes_part = peer.takes_part(scenario.name) && (round < 2 || !long[index]);
                if is_counted && !peer.has_server() || !takes_part {
                    continue;
                }
                let place = scenario::Place { at, scale: arguments.scale };
                let samples = match scenario.run(peer, place, &control, is_counted) {
                    Ok(samples) => samples,
                    Err(text) => {
                        report.failed(&scenario, peer, &text);
                        continue;
                    }
                };
                long[index] = samples.iter().map(|sample| sample.time).sum::<Duration>() > LONG;
                if is_counted {
                    report.count(&scenario, peer, samples);
                } else {
                    report.add(&scenario, peer, samples);
                }
            }
        }
        report.print(&scenario);
        layers::clear(at).map_err(|e| format!("{}: {e}", at.display()))?;
    }
    report.write(&arguments.out)
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    let done = match words.peek().map(String::as_str) {
        Some("--serve") => control::serve(words.nth(1)),
        Some("--mount-least") => least::start(words.skip(1)),
        Some("-h" | "--help") | None => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => parse(words).and_then(run),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("lamina-bench: {text}");
            ExitCode::FAILURE
        }
    }
}
