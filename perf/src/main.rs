//! Head-to-head measurements of Blockferry against its peers.
//!
//! `blockferry-perf copy [DIRECTORY] [ROUNDS] [MIB]` copies a raw disk of incompressible data between
//! files, contenders in turn, after one round of warming up. What counts is the ratio of two
//! neighbours in one round; the table shows the median of the ratios with its smallest and largest
//! value. A contender's time ends when its target is durable. Nothing here passes or fails.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// One contender: a name and the command line that copies `source` to the existing `target`.
struct Contender {
    name: &'static str,
    command: fn(&Path, &Path) -> Vec<String>,
}

const CONTENDERS: [Contender; 3] = [
    Contender {
        name: "blockferry mirror",
        command: |s, t| {
            let program = std::env::var("BLOCKFERRY").unwrap_or_else(|_| "target/release/blockferry".into());
            [&program, "mirror", "--quiet", "--force", "-f", "raw", "-F", "raw", &text(s), &text(t)]
                .map(str::to_owned)
                .to_vec()
        },
    },
    Contender {
        name: "qemu-img convert -t none -T none -m 16 -W",
        command: |s, t| {
            [
                "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none", "-m",
                "16", "-W",
            ]
            .map(str::to_owned)
            .into_iter()
            .chain([text(s), text(t)])
            .collect()
        },
    },
    Contender {
        name: "dd bs=4M direct",
        command: |s, t| {
            vec![
                "dd".into(),
                format!("if={}", text(s)),
                format!("of={}", text(t)),
                "bs=4M".into(),
                "iflag=direct".into(),
                "oflag=direct".into(),
                "conv=notrunc,fdatasync".into(),
                "status=none".into(),
            ]
        },
    },
];

fn text(path: &Path) -> String {
    path.display().to_string()
}

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Wall seconds, and the children's CPU seconds.
fn run(contender: &Contender, source: &Path, target: &Path) -> Fallible<(f64, f64)> {
    let line = (contender.command)(source, target);
    let (program, arguments) = line.split_first().ok_or("an empty command line")?;
    let cpu = children_cpu_seconds()?;
    let began = Instant::now();
    let status = Command::new(program).args(arguments).stdin(Stdio::null()).status()?;
    if !status.success() {
        return Err(format!("{} ended with {status}", line.join(" ")).into());
    }
    std::fs::File::open(target)?.sync_all()?;
    Ok((began.elapsed().as_secs_f64(), children_cpu_seconds()? - cpu))
}

/// User and system time of children that have ended, from /proc (ticks of 10 ms).
fn children_cpu_seconds() -> Fallible<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after = stat.rsplit_once(')').ok_or("no process name in /proc/self/stat")?.1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(13) + ticks(14)) / 100.0)
}

fn fill(path: &Path, bytes: usize) -> Fallible<()> {
    use std::io::Write;
    let mut rand = blockferry_ring::rand::Rand::new(1);
    let mut file = std::fs::File::create(path)?;
    let mut block = vec![0u8; 1 << 20];
    for _ in 0..bytes >> 20 {
        block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rand.next_u64().to_le_bytes()));
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn copy(directory: &Path, rounds: usize, mib: usize) -> Fallible<()> {
    let scratch = directory.join(format!("blockferry-perf-{}", std::process::id()));
    std::fs::create_dir(&scratch)?;
    let result = measure(&scratch, rounds, mib);
    std::fs::remove_dir_all(&scratch)?;
    result
}

fn measure(scratch: &Path, rounds: usize, mib: usize) -> Fallible<()> {
    let (source, target) = (scratch.join("source.img"), scratch.join("target.img"));
    fill(&source, mib << 20)?;
    std::fs::copy(&source, &target)?;
    let mut times: Vec<Vec<(f64, f64)>> = vec![Vec::new(); CONTENDERS.len()];
    for round in 0..=rounds {
        for (contender, times) in CONTENDERS.iter().zip(&mut times) {
            let time = run(contender, &source, &target)?;
            if round > 0 {
                times.push(time);
            }
        }
    }
    let gib = mib as f64 / 1024.0;
    println!("{mib} MiB, {rounds} rounds\n");
    println!("{:<44} {:>8} {:>12} {:>24}", "contender", "wall s", "CPU s / GiB", "wall / ours [min..max]");
    for (i, contender) in CONTENDERS.iter().enumerate() {
        let mut wall: Vec<f64> = times[i].iter().map(|t| t.0).collect();
        let mut cpu: Vec<f64> = times[i].iter().map(|t| t.1 / gib).collect();
        let mut ratio: Vec<f64> = times[i].iter().zip(&times[0]).map(|(t, o)| t.0 / o.0).collect();
        let (low, high) = ratio.iter().fold((f64::MAX, 0f64), |(l, h), r| (l.min(*r), h.max(*r)));
        println!(
            "{:<44} {:>8.3} {:>12.3} {:>10.2} [{low:.2}..{high:.2}]",
            contender.name,
            median(&mut wall),
            median(&mut cpu),
            median(&mut ratio),
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default| arguments.get(i).map_or(Ok(default), |a| a.parse::<usize>());
    let (Some("copy"), Ok(rounds), Ok(mib)) =
        (arguments.first().map(String::as_str), number(2, 5), number(3, 1024))
    else {
        eprintln!("usage: blockferry-perf copy [DIRECTORY] [ROUNDS] [MIB]");
        return ExitCode::from(2);
    };
    let directory = arguments.get(1).map_or_else(std::env::temp_dir, PathBuf::from);
    match copy(&directory, rounds, mib) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blockferry-perf: {error}");
            ExitCode::FAILURE
        }
    }
}
