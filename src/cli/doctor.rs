//! `blockferry doctor`: what this machine allows, what was chosen, and what is to be done where it could be better.
//!
//! Each fact has a verdict: it is good; or things work and are slower for it, with the reason and the cure; or something does
//! not work. Without a verdict are those that only describe. The exit code is that of the worst: 1 if something does not
//! work.

use std::path::{Path, PathBuf};

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Errno, Nanos, SetupError, uring};
use clap::Args;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::print::{self, product};
use super::{Global, config, room};
use crate::base::limits::NBD_CLIENTS_PER_SERVER;
use crate::base::os_name;
use crate::base::units::fmt_bytes;
use crate::block::{BlockError, Driver, Operation, WriteFlags, ZeroFlags};
use crate::engine::remote::is_remote;
use crate::engine::{Engine, ImageOptions};

const AFTER: &str = "\
Examples:
  The machine, this directory, and the one for temporary files:
      blockferry doctor

  The places that disks lie in or come from:
      blockferry doctor . /tmp

  For a script: `verdict` is good, slower or bad, and each fact says why and what to do:
      blockferry --json doctor .

Exit code 0 means that everything works, though it may be slower than it could be; 1 that something does not.";

/// Tell what kernel, limits and filesystems allow here, what was chosen, and what would make it faster
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct DoctorArgs {
    /// Look at the filesystems or devices of these paths too (directories, files, block devices) [default: this directory,
    /// and the one for temporary files]
    #[arg(value_name = "PATH", value_parser = crate::cli::image::path)]
    paths: Vec<PathBuf>,
}

/// What is said of a fact.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// It only describes.
    Told,
    Good,
    /// It works, with a loss: why, and what to do.
    Slower(String, &'static str),
    /// It does not work: why, and what to do.
    Bad(String, String),
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Verdict::Told => "told",
            Verdict::Good => "good",
            Verdict::Slower(..) => "slower",
            Verdict::Bad(..) => "bad",
        }
    }
}

#[derive(Clone, Debug)]
struct Fact {
    about: String,
    name: String,
    value: String,
    verdict: Verdict,
}

impl Fact {
    fn to_json(&self) -> Value {
        let (because, cure) = match &self.verdict {
            Verdict::Told | Verdict::Good => (None, None),
            Verdict::Slower(because, cure) => (Some(because.as_str()), Some(*cure)),
            Verdict::Bad(because, cure) => (Some(because.as_str()), Some(cure.as_str())),
        };
        json!({
            "about": self.about, "name": self.name, "value": self.value,
            "verdict": self.verdict.word(), "because": because, "do": cure,
        })
    }

    fn to_text(&self) -> String {
        let fact = format!("{}: {}", self.name, self.value);
        match &self.verdict {
            Verdict::Told => fact,
            Verdict::Good => format!("{fact} (good)"),
            Verdict::Slower(because, cure) => {
                format!("{fact} (slower because {}; {cure})", because.trim_end_matches('.'))
            }
            Verdict::Bad(because, cure) => {
                format!("{fact} (does not work: {}; {cure})", because.trim_end_matches('.'))
            }
        }
    }
}

/// The facts, in the order in which they are told.
#[derive(Debug, Default)]
struct Findings(Vec<Fact>);

impl Findings {
    fn add(&mut self, about: &str, name: &str, value: impl Into<String>, verdict: Verdict) {
        let (about, name) = (about.to_owned(), name.to_owned());
        self.0.push(Fact { about, name, value: value.into(), verdict });
    }

    /// The worst verdict.
    fn worst(&self) -> &'static str {
        let has = |word: &str| self.0.iter().any(|fact| fact.verdict.word() == word);
        ["bad", "slower"].into_iter().find(|word| has(word)).unwrap_or("good")
    }

    fn print(&self, global: &Global) -> Exit {
        let worst = self.worst();
        if global.json {
            print::has_ended();
            let facts: Vec<Value> = self.0.iter().map(Fact::to_json).collect();
            product!("{}", json!({"version": env!("CARGO_PKG_VERSION"), "verdict": worst, "facts": facts}));
        } else {
            product!("blockferry {}", env!("CARGO_PKG_VERSION"));
            let mut about = "";
            for fact in &self.0 {
                if fact.about != about {
                    about = fact.about.as_str();
                    product!("{about}");
                }
                product!("  {}", fact.to_text());
            }
            product!(
                "{}",
                match worst {
                    "good" => "Everything is good",
                    "slower" => "Everything works; some things are slower than they could be",
                    _ => "Something does not work",
                }
            );
        }
        if worst == "bad" { Exit::Failed } else { Exit::Done }
    }
}

/// Runs the command.
pub fn main(global: &Global, args: &DoctorArgs) -> Result<Exit, Failure> {
    let mut findings = Findings::default();
    findings.add("kernel", "Linux", read_line("/proc/sys/kernel/osrelease"), Verdict::Told);
    let engine = Engine::new(&config(global));
    limits(&mut findings, engine.as_ref().ok());
    let engine = match engine {
        Ok(engine) => engine,
        Err(error) => {
            let verdict = match &error {
                SetupError::Forbidden { reason, cure } => Verdict::Bad(reason.clone(), cure.clone()),
                other => Verdict::Bad(other.to_string(), "without it nothing works".into()),
            };
            findings.add("io_uring, as chosen", "set up", "no", verdict);
            let exit = findings.print(global);
            // The object says it already.
            return if global.json { Ok(exit) } else { Err(error.into()) };
        }
    };
    for line in engine.ring().describe() {
        findings.0.push(chosen("io_uring, as chosen", &line));
    }
    match uring::probe() {
        Ok(lines) => findings.0.extend(lines.iter().map(|line| offered("io_uring, as offered", line))),
        // A second ring beside that of the engine: what is locked for it counts against the user, too.
        Err(error) => {
            let verdict = Verdict::Slower(error.to_string(), "there is hardly room for one ring");
            findings.add("io_uring, as offered", "asked", "no", verdict);
        }
    }
    let mut paths = args.paths.clone();
    if paths.is_empty() {
        paths.extend([PathBuf::from("."), std::env::temp_dir()]);
    }
    for path in &paths {
        look_at(&engine, path, args.paths.is_empty(), &mut findings);
    }
    Ok(findings.print(global))
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn limits(findings: &mut Findings, engine: Option<&Engine>) {
    let limit = |resource| {
        let limit = getrlimit(resource);
        let show = |value: Option<u64>| value.map_or_else(|| "unlimited".to_owned(), |v| v.to_string());
        format!("{} (hard: {})", show(limit.current), show(limit.maximum))
    };
    let registered =
        engine.map(|engine| engine.ring().arena()).map(|arena| (arena.bytes_fixed(), arena.bytes()));
    let memory = match registered {
        None => Verdict::Told,
        Some((fixed, all)) if fixed < all => Verdict::Slower(
            format!("only {} of {} could be registered", fmt_bytes(fixed as u64), fmt_bytes(all as u64)),
            "raise the limit of locked memory to 64 MiB (`ulimit -l 65536`, LimitMEMLOCK=64M)",
        ),
        Some(_) => Verdict::Good,
    };
    findings.add("limits", "RLIMIT_MEMLOCK, bytes that may be registered", limit(Resource::Memlock), memory);
    let clients = room::clients_max(NBD_CLIENTS_PER_SERVER);
    let files = match clients < NBD_CLIENTS_PER_SERVER {
        true => Verdict::Slower(
            format!("it leaves room for {clients} clients of {NBD_CLIENTS_PER_SERVER}"),
            "raise the limit on open files (`ulimit -n`, LimitNOFILE=)",
        ),
        false => Verdict::Good,
    };
    findings.add("limits", "RLIMIT_NOFILE, open files", limit(Resource::Nofile), files);
    let disabled = read_line("/proc/sys/kernel/io_uring_disabled");
    let verdict = match (disabled.as_str(), engine.is_some()) {
        ("0" | "", _) => Verdict::Good,
        (_, true) => Verdict::Told,
        (_, false) => Verdict::Bad(
            "it forbids io_uring".into(),
            "set it to 0 (`sysctl kernel.io_uring_disabled=0`)".into(),
        ),
    };
    findings.add("limits", "kernel.io_uring_disabled", disabled, verdict);
    findings.add("limits", "user id", rustix::process::getuid().as_raw().to_string(), Verdict::Told);
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let verdict = match processors {
        0 | 1 => Verdict::Slower(
            "a job, what the kernel does for it, and its clients share one CPU".into(),
            "give it a second one",
        ),
        _ => Verdict::Good,
    };
    findings.add("limits", "CPUs", processors.to_string(), verdict);
}

/// A line of what was set up, judged.
fn chosen(about: &str, line: &str) -> Fact {
    let (name, value) = line.split_once(": ").unwrap_or((line, "yes"));
    let newer = "run a newer kernel (6.12 or later has all of it)";
    let verdict = match name {
        "set-up flags" if value.contains("DEFER_TASKRUN") => Verdict::Good,
        "set-up flags" => Verdict::Slower("completions interrupt the program".into(), newer),
        name if name.starts_with("set-up flags ") => {
            Verdict::Slower("the kernel knows less of them".into(), newer)
        }
        name if name.starts_with("minimum wait") && value == "no" => {
            Verdict::Slower("many small completions are taken one by one".into(), newer)
        }
        "registered files" | "registered buffers" => Verdict::Slower(
            "each request looks up its file or its memory".into(),
            "see what the message says, and the limits above",
        ),
        name if name.starts_with("limit of io-wq") => {
            Verdict::Slower("the kernel may start many threads".into(), newer)
        }
        // What is registered of it is judged with the limit that decides it.
        "arena" => Verdict::Told,
        _ => Verdict::Good,
    };
    Fact { about: about.into(), name: name.into(), value: value.into(), verdict }
}

/// A line of what the kernel offers, judged.
fn offered(about: &str, line: &str) -> Fact {
    let (name, value) = line.split_once(": ").unwrap_or((line, "yes"));
    if !name.starts_with("operation ") {
        return chosen(about, line);
    }
    let verdict = match value {
        "yes" => Verdict::Good,
        _ => Verdict::Slower(
            "the kernel does not have it, and something else takes its place".into(),
            "run a newer kernel (6.12 or later has all of it)",
        ),
    };
    Fact { about: about.into(), name: name.into(), value: value.into(), verdict }
}

/// How long a server may take to tell what it has.
const SERVER_NANOS: Nanos = 10_000_000_000;

/// Tries things out on a scratch file in a directory, or looks at a file or device without writing to it.
fn look_at(engine: &Engine, path: &Path, is_default: bool, findings: &mut Findings) {
    let about = format!("path {}", os_name::from_path(path));
    if path.is_dir() {
        if let Err(error) = try_out(engine, path, &about, findings) {
            // Nobody has asked for this one.
            let verdict = match is_default {
                true => Verdict::Told,
                false => Verdict::Bad(error.to_string(), "name a directory that you may write to".into()),
            };
            let value = if is_default { format!("no: {error}") } else { "no".to_owned() };
            findings.add(&about, "writable", value, verdict);
        }
        return;
    }
    let options = ImageOptions { lock: false, read_only: true, ..ImageOptions::raw() };
    let name = os_name::from_path(path);
    let opened = match is_remote(&name) {
        true => {
            let (ring, asked) = (engine.ring().clone(), engine.start_open(&name, &options));
            engine.run(async move {
                let waited = ring.sleep(SERVER_NANOS);
                match either(asked.take(), waited).await {
                    Either::First(opened) => opened,
                    Either::Second(()) => Err(BlockError::new(Operation::Open, name, Errno::ETIMEDOUT)),
                }
            })
        }
        false => engine.open_as_said(&name, &options),
    };
    match opened {
        Ok(node) => {
            findings.add(&about, "size", fmt_bytes(node.driver().len()), Verdict::Told);
            describe(&**node.driver(), &about, findings);
        }
        Err(error) => {
            let cure = "name a file, a directory, a block device or a server's disk";
            let verdict = Verdict::Bad(error.to_string(), cure.into());
            findings.add(&about, "can be opened", "no", verdict);
        }
    }
}

fn try_out(engine: &Engine, directory: &Path, about: &str, findings: &mut Findings) -> Result<(), Failure> {
    let path = directory.join(format!(".blockferry-doctor-{}", std::process::id()));
    let ring = engine.ring().clone();
    let (make, at) = (ring.clone(), path.clone());
    engine.run(async move {
        crate::protocol::file::FileDriver::create(&make, &at, 1 << 20, Default::default()).await
    })?;
    let options = ImageOptions { lock: false, ..ImageOptions::raw() };
    let result = engine.open_as_said(&format!("file:{}", os_name::from_path(&path)), &options);
    let result = result.map(|node| {
        let driver = node.driver().clone();
        describe(&*driver, about, findings);
        for (name, value, verdict) in engine.run(async move { answers(&ring, &*driver).await }) {
            findings.add(about, name, value, verdict);
        }
    });
    let _ = engine.ring().unlink(&path);
    Ok(result?)
}

/// What a filesystem answers to what the engine would like to do there.
async fn answers(ring: &blockferry_ring::Ring, driver: &dyn Driver) -> Vec<(&'static str, String, Verdict)> {
    let mut told = Vec::new();
    let mut answer = |name, result: Result<(), BlockError>, otherwise: Verdict| {
        told.push(match result {
            Ok(()) => (name, "yes".to_owned(), Verdict::Good),
            Err(error) => (name, format!("no ({})", error.errno), otherwise),
        });
    };
    let other = "use another filesystem (ext4, XFS and Btrfs have all of it)";
    let slower = |because: &str| Verdict::Slower(because.into(), other);
    let bad = |because: &str| Verdict::Bad(because.into(), other.into());
    let buf = ring.alloc(65_536).await.freeze();
    answer("write", driver.write(0, buf.clone(), WriteFlags::default()).await, bad("nothing can be written"));
    let fua = driver.write(0, buf, WriteFlags { fua: true }).await;
    answer("write through (FUA)", fua, slower("every durable write takes a flush of its own"));
    let unmap = ZeroFlags { may_unmap: true, no_fallback: true, fua: false };
    let unmapped = driver.write_zeroes(0, 65_536, unmap).await;
    answer(
        "zero by giving space back (punch hole)",
        unmapped,
        slower("zeroes take room, and are written out"),
    );
    let zero = ZeroFlags { may_unmap: false, no_fallback: true, fua: false };
    let zeroed = driver.write_zeroes(65_536, 65_536, zero).await;
    answer("zero keeping space (zero range)", zeroed, slower("zeroes that keep their room are written out"));
    answer("flush", driver.flush().await, bad("nothing can be made durable"));
    let extent = driver.block_status(524_288, 4096).await;
    answer("holes are told from data", extent.map(drop), slower("holes are read and compared with zero"));
    let mark =
        driver.local_file().map(|file| ring.set_attribute(&file, "user.blockferry.state", Some(b"doctor")));
    told.push(match mark {
        Some(Ok(())) => ("extended attributes (marks on targets)", "yes".to_owned(), Verdict::Good),
        refused => (
            "extended attributes (marks on targets)",
            match refused {
                Some(Err(errno)) => format!("no ({errno}); notes in the state directory take their place"),
                _ => "no; notes in the state directory take their place".to_owned(),
            },
            Verdict::Told,
        ),
    });
    told
}

fn describe(driver: &dyn Driver, about: &str, findings: &mut Findings) {
    let (limits, can) = (driver.limits(), driver.capabilities());
    findings.add(about, "driver", driver.kind(), Verdict::Told);
    let direct = limits.request_align > 1 || limits.mem_align > 1;
    let (value, verdict) = match direct {
        true => (
            format!("yes (requests aligned to {}, memory to {})", limits.request_align, limits.mem_align),
            Verdict::Good,
        ),
        false => (
            "no".to_owned(),
            Verdict::Slower(
                "what is read and written goes through the page cache".into(),
                "use a filesystem that has it, or --cache buffered if that is meant",
            ),
        ),
    };
    findings.add(about, "O_DIRECT", value, verdict);
    let all = [
        (can.fua, "durable writes"),
        (can.discard, "discard"),
        (can.zero_fast, "zeroes without data"),
        (can.zero_unmap, "zeroes that give room back"),
        (can.status, "holes"),
    ];
    let named: Vec<&str> = all.iter().filter(|(has, _)| *has).map(|(_, name)| *name).collect();
    let value = if named.is_empty() { "nothing".to_owned() } else { named.join(", ") };
    findings.add(about, "offers before it is tried", value, Verdict::Told);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_judged_and_the_worst_decides() {
        let mut findings = Findings::default();
        assert_eq!(findings.worst(), "good");
        for (line, word) in [
            ("set-up flags: SINGLE_ISSUER | DEFER_TASKRUN", "good"),
            ("set-up flags: COOP_TASKRUN", "slower"),
            ("minimum wait (MIN_TIMEOUT): no", "slower"),
            ("minimum wait (MIN_TIMEOUT): yes", "good"),
            ("registered files: no (ENOMEM)", "slower"),
            ("arena: 24 MiB, 8 MiB of it registered", "told"),
        ] {
            let fact = chosen("x", line);
            assert_eq!(fact.verdict.word(), word, "{line}");
            findings.0.push(fact);
        }
        assert_eq!(offered("x", "operation SEND_ZC: no").verdict.word(), "slower");
        assert_eq!(offered("x", "operation SEND_ZC: yes").verdict.word(), "good");
        assert_eq!(findings.worst(), "slower");
        let text = findings.0[1].to_text();
        assert!(text.contains("slower because ") && text.contains("newer kernel"), "{text}");
        findings.add("path p", "write", "no", Verdict::Bad("why".into(), "what".into()));
        assert_eq!(findings.worst(), "bad");
        let json = findings.0.last().unwrap().to_json();
        assert_eq!(
            (&json["verdict"], &json["because"], &json["do"]),
            (&json!("bad"), &json!("why"), &json!("what"))
        );
    }
}
