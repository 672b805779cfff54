//! What fuzzing starts from and what it found, replayed with a stable compiler; and many small damages to each of it.

use std::path::Path;

use fuse_tests::ops::Rng;
use fuse_tests::targets::{TARGETS, Target};

/// Damages to each file of the corpus.
const DAMAGES: usize = 60;

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{}", dir.display());
    files
}

/// Flips, cuts, repeats or overwrites something, and puts the sums of headers right so that more is looked at than those.
fn damaged(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + rng.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(bytes.len());
        match rng.below(5) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = *rng.pick(b"\0/.0179-\x80\xffgxSLK"),
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 512).min(bytes.len());
                let block = bytes[at / 512 * 512..end].to_vec();
                bytes.splice(at / 512 * 512..at / 512 * 512, block);
            }
            _ => {
                let digits = rng.below(1 << 20).to_string();
                let end = (at + digits.len()).min(bytes.len());
                bytes[at..end].copy_from_slice(&digits.as_bytes()[..end - at]);
            }
        }
    }
    for block in bytes.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        }
    }
    bytes
}

fn replay((name, run): Target) {
    for (number, (file, bytes)) in corpus(name).iter().enumerate() {
        let seeds = 0..DAMAGES;
        run(bytes);
        for seed in seeds {
            let mut rng = Rng::new((number * 1000 + seed) as u64);
            let case = damaged(bytes, &mut rng);
            let result = std::panic::catch_unwind(|| run(&case));
            assert!(result.is_ok(), "{name}: {file}, damage {seed}");
        }
    }
}

#[test]
fn every_target_has_a_corpus_that_replays() {
    for target in TARGETS {
        replay(*target);
    }
}
