//! Many generated cases, and what is reported of those that fail: one of each kind, made as small as it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cases::Case;
use crate::run::{Config, Failure, run_batch};

/// Runs a batch; a failure of ours that is a panic (a mount that fails, a lower layer that changed) is a failure too.
fn run_caught(cases: &[Case], config: &Config) -> Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(|| run_batch(cases, config))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(Failure { case: None, text: text.unwrap_or_default() })
    })
}

/// How many cases share a mount.
const BATCH: usize = 50;

/// Runs `count` cases from `seed` on. At the first batch with a difference it stops, unless `FUSE_TESTS_SURVEY` is set: then it
/// goes on to the end and reports all kinds of differences.
///
/// # Panics
/// At a difference, with a shrunk case of each kind in its printed form.
pub fn run_many(seed: u64, count: usize, config: &Config) {
    let seeds: Vec<u64> = (0..count as u64).map(|n| seed.wrapping_add(n)).collect();
    let mut found = Findings::default();
    for seeds in seeds.chunks(BATCH) {
        let cases: Vec<Case> = seeds.iter().map(|s| Case::generate(*s, config)).collect();
        if let Err(failure) = run_caught(&cases, config) {
            found.add(&cases, &failure, config);
            if std::env::var_os("FUSE_TESTS_SURVEY").is_none() {
                break;
            }
        }
    }
    assert!(found.0.is_empty(), "{found}");
}

/// Runs one case.
///
/// # Panics
/// At a difference.
pub fn run_one(case: &Case, config: &Config) {
    if let Err(failure) = run_caught(std::slice::from_ref(case), config) {
        panic!("{}\n{case}", failure.text);
    }
}

/// Every kind of difference with how many cases showed it, and one of them, shrunk.
#[derive(Default)]
struct Findings(BTreeMap<String, (usize, String)>);

impl Findings {
    fn add(&mut self, cases: &[Case], failure: &Failure, config: &Config) {
        // A batch stops at its first failure, and a panic does not say which case it was: each is tried alone.
        let mut alone = 0;
        for case in cases {
            if let Err(failure) = run_caught(std::slice::from_ref(case), config) {
                alone += 1;
                let kind = kind_of(&failure.text);
                if let Some((count, _)) = self.0.get_mut(&kind) {
                    *count += 1;
                } else {
                    let (case, text) = shrink(case.clone(), failure.text, config);
                    self.0.insert(kind, (1, format!("{text}\n{CASE_FOLLOWS}\n{case}")));
                }
            }
        }
        if alone == 0 {
            let seeds: Vec<u64> = cases.iter().map(|case| case.seed).collect();
            let text = format!("{}\nno case shows it alone; the seeds: {seeds:?}", failure.text);
            self.0.insert(kind_of(&failure.text), (1, text));
        }
    }
}

/// Stands before each shrunk case in a report.
pub const CASE_FOLLOWS: &str =
    "--- shrunk case, to be given to the test `replay` in FUSE_TESTS_REPLAY:";

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} kinds of differences", self.0.len())?;
        for (number, (kind, (count, text))) in self.0.iter().enumerate() {
            writeln!(f, "=== kind {} ({count} cases): {kind}\n{text}", number + 1)?;
        }
        Ok(())
    }
}

/// What makes two failures alike: the operation and its outcomes, or the fields in which trees differ.
fn kind_of(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    if let Some((_, rest)) = first.split_once('`')
        && let Some((op, outcomes)) = rest.split_once("`: ours gives ")
        && let Some((ours, kernel)) = outcomes.split_once(", the kernel ")
    {
        let word = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
        return format!("{}: {} for {}", word(op), word(ours), word(kernel));
    }
    if first.ends_with("(left ours, right the kernel's):") || first.ends_with("what they were:") {
        let when = match first.split_once(" the trees").or(first.split_once(" both trees")) {
            Some((when, _)) if !when.starts_with("after operation") => when,
            _ => "at the end",
        };
        let fields: BTreeSet<&str> =
            text.lines().skip(1).filter_map(|line| line.split(": ").nth(1)).collect();
        return format!("{when}: {fields:?}");
    }
    let first = match first.strip_prefix("upper layer: ") {
        Some(problem) => problem.rsplit(": ").next().unwrap_or_default(),
        None => first,
    };
    first.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Removes operations and layer lines as long as the case fails in the same way, by halves, quarters and so on.
fn shrink(mut case: Case, mut text: String, config: &Config) -> (Case, String) {
    let mut budget = 250;
    let kind = kind_of(&text);
    loop {
        let before = case.clone();
        let parts = case.layers.len() + 1;
        for part in 0..parts {
            let length = |case: &Case| case.layers.get(part).map_or(case.ops.len(), Vec::len);
            let mut step = length(&case).div_ceil(2);
            while step > 0 {
                let mut at = 0;
                while at < length(&case) && budget > 0 {
                    let mut smaller = case.clone();
                    let end = (at + step).min(length(&case));
                    if part < case.layers.len() {
                        smaller.layers[part].drain(at..end);
                    } else {
                        smaller.ops.drain(at..end);
                    }
                    budget -= 1;
                    match run_caught(std::slice::from_ref(&smaller), config) {
                        Err(failure) if kind_of(&failure.text) == kind => {
                            (case, text) = (smaller, failure.text);
                        }
                        _ => at += step,
                    }
                }
                step /= 2;
            }
        }
        if case == before || budget == 0 {
            return (case, text);
        }
    }
}
