//! A story: its folder, its chain, its log, and the judgement after each step.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use blockferry::base::planted::{self, Bug};
use blockferry::engine::ImageOptions;
use blockferry::protocol::open::Cache;
use blockferry_ring::Ring;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::image::{Image, Layout, any_len};
use super::view::View;
use super::{guest, steps};
use common::image::Dice;

/// How a step goes wrong: what was seen.
pub type Told<T> = Result<T, String>;

/// Who does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Teller {
    /// The built command, or the library.
    Us,
    /// QEMU's tools.
    Qemu,
}

/// One story.
pub struct Story {
    /// What decides.
    pub dice: Dice,
    /// What decides about the files beside the steps.
    pub aside: Dice,
    /// The folder of the images.
    pub scratch: Folder,
    /// The layers, the lowest first.
    pub chain: Vec<Image>,
    /// What was done, as command lines.
    pub log: Vec<String>,
    /// How often each kind of step was told by whom.
    pub tally: BTreeMap<String, u64>,
    /// Disks of gigabytes are allowed.
    pub large: bool,
    /// Kinds of steps that are left out.
    pub without: Vec<String>,
    /// A bug that the story should find.
    planted: Option<Bug>,
    ring: Option<Ring>,
    names: u64,
    judgements: u64,
    qemu_crashed: bool,
    /// What stands in the file of the model.
    saved: View,
}

/// A folder, removed at the end. In memory, where that can be had: thousands of programs run here, and each flushes.
pub struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder =
            tempfile::Builder::new().prefix("bf.").tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Folder(folder.expect("a folder"))
    }

    /// Where it is.
    pub fn dir(&self) -> &std::path::Path {
        self.0.path()
    }

    /// The path of a name in it.
    pub fn path(&self, name: &str) -> String {
        self.dir().join(name).to_str().expect("a path in UTF-8").to_owned()
    }
}

/// How a program ended.
pub struct Outcome {
    /// With success.
    pub ok: bool,
    /// What it printed.
    pub text: String,
}

impl Story {
    /// The story of this seed, by a program with this bug.
    pub fn new(seed: u64, planted: Option<Bug>) -> Story {
        let mut dice = Dice::new(seed);
        let large = dice.below(20) == 0;
        Story {
            dice,
            aside: Dice::new(!seed),
            scratch: Folder::new(),
            chain: Vec::new(),
            log: Vec::new(),
            tally: BTreeMap::new(),
            large,
            without: std::env::var("SWEEP_WITHOUT")
                .unwrap_or_default()
                .split(',')
                .map(str::to_owned)
                .collect(),
            planted,
            ring: None,
            names: 0,
            judgements: 0,
            qemu_crashed: false,
            saved: View::default(),
        }
    }

    /// Tells it to the end, or to the first thing that is wrong. Where one of QEMU's programs crashes nobody knows what the
    /// image should show: the story ends there, and is counted.
    pub fn tell(&mut self) -> Told<()> {
        planted::plant(self.planted);
        let told = self.tell_all();
        if told.is_err() && self.qemu_crashed {
            *self.tally.entry("crashes of QEMU's programs".into()).or_default() += 1;
            return Ok(());
        }
        told
    }

    fn tell_all(&mut self) -> Told<()> {
        let len = any_len(&mut self.dice, self.large);
        let base = self.fresh_image(len)?;
        self.chain.push(base);
        for _ in 0..self.dice.below(6) {
            let teller = self.anyone();
            steps::overlay(self, teller)?;
            guest::change(self, teller)?;
        }
        let all: Vec<usize> = (0..self.chain.len()).collect();
        self.judge(&all)?;
        for n in 0..12 + self.dice.below(29) {
            let changed = steps::any(self)?;
            self.judge(&changed)?;
            if n % 8 == 7 {
                self.judge_views(Teller::Us)?;
            }
        }
        self.judge_views(Teller::Qemu)
    }

    /// The uppermost layer.
    pub fn top(&mut self) -> &mut Image {
        self.chain.last_mut().expect("a chain is never empty")
    }

    /// Us or QEMU. QEMU more often: some kinds of steps are ours alone.
    pub fn anyone(&mut self) -> Teller {
        if self.dice.below(5) < 2 { Teller::Us } else { Teller::Qemu }
    }

    /// A name that was not used yet.
    pub fn new_name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}{}", self.names)
    }

    /// A name for an image of this layout.
    pub fn name_for(&mut self, format: &str) -> String {
        let name = self.new_name("i");
        format!("{name}.{format}")
    }

    /// A layout.
    pub fn any_layout(&mut self, len: u64, backed: bool) -> Layout {
        let data_file = self.new_name("data");
        Layout::any(&mut self.dice, len, backed, &data_file)
    }

    /// A new image without a backing file, with something in it; not in the chain yet.
    pub fn fresh_image(&mut self, len: u64) -> Told<Image> {
        let layout = self.any_layout(len, false);
        let teller = self.anyone();
        let mut image = steps::create(self, teller, layout, len, None)?;
        guest::change_image(self, teller, &mut image, 2)?;
        Ok(image)
    }

    /// The ring by which our guests work.
    pub fn ring(&mut self) -> Ring {
        self.ring.get_or_insert_with(common::qcow2::ring).clone()
    }

    /// Counts a step.
    pub fn count(&mut self, kind: &str, teller: Teller) {
        let who = match teller {
            Teller::Us => "by us",
            Teller::Qemu => "by QEMU",
        };
        *self.tally.entry(format!("{kind} {who}")).or_default() += 1;
    }

    /// Runs a program in the folder of the images.
    pub fn run(&mut self, program: &str, arguments: &[String]) -> Outcome {
        let quoted = |text: &String| {
            let plain =
                text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c)) && !text.is_empty();
            if plain { text.clone() } else { format!("'{text}'") }
        };
        let line = format!("{program} {}", arguments.iter().map(quoted).collect::<Vec<_>>().join(" "));
        self.log.push(line);
        let path = match program {
            "blockferry" => {
                std::env::var("SWEEP_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_blockferry").to_owned())
            }
            other => other.to_owned(),
        };
        let mut command = Command::new(path);
        command.args(arguments).current_dir(self.scratch.dir()).env_remove("BLOCKFERRY_LOG");
        if let Some(bug) = self.planted {
            command.env(planted::VARIABLE, format!("{bug:?}"));
        }
        let output = in_time(command.stdin(Stdio::null()), Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let outcome = Outcome { ok: output.status.success(), text: text.trim().to_owned() };
        if !outcome.ok {
            // What glibc finds wrong with the heap ends in an abort.
            let crashes = [Signal::SEGV, Signal::ABORT, Signal::BUS].map(Signal::as_raw);
            let crashed = output.status.signal().is_some_and(|signal| crashes.contains(&signal));
            self.qemu_crashed |= program != "blockferry" && crashed;
            let (status, text) = (output.status, &outcome.text);
            self.log.push(format!("  # {status}: {text}"));
        }
        outcome
    }

    /// Runs one of the two programs, which has to succeed.
    pub fn must(&mut self, teller: Teller, arguments: &[String]) -> Told<()> {
        let outcome = self.run(program_of(teller), arguments);
        if outcome.ok { Ok(()) } else { Err(format!("it was refused or failed: {}", outcome.text)) }
    }

    /// Runs one of the two programs: whether it succeeded. If not, nothing may have changed, which the next judgement sees.
    pub fn may(&mut self, teller: Teller, arguments: &[String]) -> bool {
        self.run(program_of(teller), arguments).ok
    }

    /// Runs QEMU's tool, which has to succeed with what it looks at.
    fn qemu(&mut self, program: &str, arguments: &[&str]) -> Told<String> {
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        let outcome = self.run(program, &arguments);
        // What only looks is not part of the story.
        if outcome.ok {
            self.log.pop();
            Ok(outcome.text)
        } else {
            Err(format!("{program} {arguments:?}: {}", outcome.text))
        }
    }

    /// The length that an image says it has.
    pub fn stored_len(&self, image: &Image) -> u64 {
        let path = self.scratch.path(&image.name);
        let file = std::fs::File::open(&path).expect("an image");
        match image.layout {
            Layout::Raw => file.metadata().expect("its length").len(),
            Layout::Qcow2(_) => {
                let mut bytes = [0; 8];
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 24).expect("a header");
                u64::from_be_bytes(bytes)
            }
        }
    }

    /// Takes over the length that a program has made of `len`: that, or the same in whole sectors.
    pub fn adopt_len(&self, image: &mut Image, len: u64) -> Told<()> {
        let stored = self.stored_len(image);
        let sectors = len.next_multiple_of(512);
        let fits = stored == sectors || (stored == len && image.layout == Layout::Raw);
        if !fits {
            return Err(format!("{} has {stored} bytes where {len} were asked for", image.name));
        }
        image.view.resize(stored);
        Ok(())
    }

    /// QEMU finds nothing wrong with what was changed, and the uppermost shows what the model has.
    fn judge(&mut self, changed: &[usize]) -> Told<()> {
        for &layer in changed {
            let Some(image) = self.chain.get(layer) else { continue };
            if image.layout != Layout::Raw {
                let name = image.name.clone();
                self.qemu("qemu-img", &["check", "-q", "-f", "qcow2", &name])?;
            }
        }
        self.judgements += 1;
        // To start a program takes longer than to read a small disk.
        let reader = if self.large || self.judgements.is_multiple_of(3) { Teller::Qemu } else { Teller::Us };
        self.judge_view(self.chain.len() - 1, reader)
    }

    /// Every layer shows what the model has.
    fn judge_views(&mut self, reader: Teller) -> Told<()> {
        let reader = if self.large { Teller::Qemu } else { reader };
        (0..self.chain.len()).try_for_each(|layer| self.judge_view(layer, reader))
    }

    fn judge_view(&mut self, layer: usize, reader: Teller) -> Told<()> {
        let image = &self.chain[layer];
        let stored = self.stored_len(image);
        if stored != image.view.len() {
            return Err(format!("{} has {stored} bytes, the model {}", image.name, image.view.len()));
        }
        if reader == Teller::Us {
            return self.read_ourselves(layer);
        }
        image.view.save(&self.scratch.path("model"), &mut self.saved);
        let (name, format) = (image.name.clone(), image.layout.format());
        self.qemu("qemu-img", &["compare", "-f", "raw", "-F", format, "model", &name])?;
        Ok(())
    }

    fn read_ourselves(&mut self, layer: usize) -> Told<()> {
        const PIECE: u64 = 1 << 20;
        let (ring, image) = (self.ring(), self.chain[layer].clone());
        let options = ImageOptions {
            format: Some(image.layout.of_ours()),
            cache: Cache::Buffered,
            read_only: true,
            ..ImageOptions::default()
        };
        let (path, r) = (self.scratch.path(&image.name), ring.clone());
        ring.block_on(async move {
            let fail = |error: blockferry::block::BlockError| error.to_string();
            let disk = blockferry::engine::open::open(&r, &path, &options).await.map_err(fail)?;
            for at in (0..image.view.len()).step_by(PIECE as usize) {
                let len = PIECE.min(image.view.len() - at);
                let (buf, result) = disk.read(at, r.alloc(len as usize).await).await;
                result.map_err(fail)?;
                if buf.as_slice() != image.view.read(at, len) {
                    return Err(format!("{}: we read something else in {len} bytes at {at}", image.name));
                }
            }
            Ok(())
        })
    }

    /// Removes the files of an image that is no longer part of the chain.
    pub fn forget(&mut self, image: &Image) {
        for file in image.files() {
            std::fs::remove_file(self.scratch.path(&file)).expect("a file that was there");
        }
    }
}

/// Runs a program to its end, which has to come in time: a hang is a failure with a text.
fn in_time(command: &mut Command, most: Duration) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a program that starts");
    let pid = Pid::from_child(&child);
    let handle = pidfd_open(pid, PidfdFlags::empty()).expect("a handle of the process");
    let (ended, end) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if end.recv_timeout(most) == Err(RecvTimeoutError::Timeout) {
                let _ = pidfd_send_signal(&handle, Signal::KILL);
            }
        });
        let output = child.wait_with_output().expect("the end of a program");
        drop(ended);
        output
    })
}

/// The program by which a teller works on images.
pub fn program_of(teller: Teller) -> &'static str {
    match teller {
        Teller::Us => "blockferry",
        Teller::Qemu => "qemu-img",
    }
}
