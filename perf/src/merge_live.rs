//! A client beside commit and stream: how long its writes take while layers are merged below it, against how long that
//! takes. The client is that of the scenarios beside a mirror ([`crate::live`]).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::copy::add_own_counters;
use crate::live::{Client, Lines};
use crate::merge::{Lab, Work, command_of, file_node, open_chain};
use crate::process::Daemon;
use crate::qsd::Qsd;
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, stop};

const GIB: u64 = 1 << 30;
/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the client runs where there is no job.
const IDLE: Duration = Duration::from_secs(3);

const LOADS: [(&str, &str); 2] = [("2,000 writes a second", "--rate 2000"), ("depth 16, no limit", "-d 16")];

/// Who does it.
#[derive(Clone, Copy, Debug)]
enum Who {
    Idle,
    /// With more options.
    Ours(&'static str),
    Daemon,
}

/// All cases by name.
pub fn cases() -> Vec<(Work, &'static str, String)> {
    let works = [Work::Intermediate, Work::Active, Work::Stream];
    let all = works.into_iter().flat_map(|work| LOADS.map(|(name, load)| (work, name, load)));
    all.map(|(work, name, load)| (work, load, format!("{}, {name}", work.name()))).collect()
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes = if cx.quick { GIB / 8 } else { 2 * GIB };
    let lab = Lab::new(&cx.folder, bytes)?;
    let contenders = [
        ("no job, blockferry serve", Role::Baseline, Who::Idle),
        ("blockferry", Role::Ours, Who::Ours("")),
        ("blockferry, guest-first off", Role::Ours, Who::Ours("--guest-first off")),
        ("QSD", Role::Peer, Who::Daemon),
    ];
    let wanted: Vec<_> = cases().into_iter().filter(|(_, _, case)| cx.wants(case)).collect();
    for (work, load, case) in wanted {
        let entries = contenders.into_iter().map(|(name, role, who)| {
            let run = Run { blockferry: cx.blockferry.clone(), folder: cx.folder.clone(), load, work };
            let lab = &lab;
            Contender {
                name: name.to_owned(),
                role,
                command: run.shown(who),
                run: Box::new(move |_| {
                    lab.prepare(work)?;
                    match who {
                        Who::Idle => run.ours(lab, None),
                        Who::Ours(options) => run.ours(lab, Some(options)),
                        Who::Daemon => run.daemon(lab),
                    }
                }),
            }
        });
        let limits = (cx.rounds_or(3), cx.seconds_max, cx.only.as_slice());
        interleave(&mut cx.sink, limits, (scenario, &case), entries.collect())?;
    }
    Ok(())
}

struct Run {
    blockferry: String,
    folder: PathBuf,
    load: &'static str,
    work: Work,
}

impl Run {
    fn words(&self, options: Option<&str>) -> String {
        match (options, self.work) {
            (None, _) => "serve -f qcow2 TOP --export URI".to_owned(),
            (Some(options), Work::Intermediate) => {
                format!("commit TOP --top mid --base base --export URI {options}")
            }
            (Some(options), Work::Active) => {
                format!("commit TOP --base base --follow --export URI {options}")
            }
            (Some(options), Work::Stream) => format!("stream TOP --export URI {options}"),
        }
    }

    fn shown(&self, who: Who) -> String {
        let server = match who {
            Who::Idle => format!("blockferry {}", self.words(None)),
            Who::Ours(options) => format!("blockferry {}", self.words(Some(options)).trim_end()),
            Who::Daemon => format!("qemu-storage-daemon, export of TOP, {}", self.work.name()),
        };
        format!("{server}; client: blockferry bench --overwrite {} --until-signal URI", self.load)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    fn client(&self) -> Fallible<Client> {
        Client::start(&self.blockferry, self.load, &self.socket(), &self.folder)
    }

    /// Ours with a job, or serving only.
    fn ours(&self, lab: &Lab, options: Option<&str>) -> Fallible<Values> {
        let uri = format!("nbd+unix:///?socket={}", self.socket().display());
        let top = lab.path("top").display().to_string();
        let mut line = vec![self.blockferry.clone(), "--json".into(), "--stats".into()];
        line.extend(self.words(options).split_whitespace().map(|word| match word {
            "TOP" => top.clone(),
            "URI" => uri.clone(),
            other => other.to_owned(),
        }));
        let _ = std::fs::remove_file(self.socket());
        let (server, mut lines) = Lines::of(&line, &self.folder.join("server.out"))?;
        server.until_listening(&self.socket())?;
        let (client, began) = (self.client()?, Instant::now());
        let mut values = Values::new();
        if options.is_some() {
            let done = if self.work == Work::Active { "BLOCK_JOB_READY" } else { "BLOCK_JOB_COMPLETED" };
            let ended = lines.until(done, began + PATIENCE)?;
            self.note(&mut values, began, ended.is_some(), &server, 0.0)?;
        } else {
            rest()?;
        }
        // It ends with its last client.
        values.insert("rss-mib".to_owned(), server.rss_mib_max()?);
        client.end(&mut values)?;
        stop::signal(server.pid(), Signal::INT);
        while lines.next(Instant::now() + Duration::from_secs(30))?.is_some() {}
        let (status, _, _) = server.wait()?;
        // 3: given up before it was done.
        if !matches!(status.code(), Some(0 | 3)) {
            return Err(format!("`{}` ended with {status}", line.join(" ")).into());
        }
        for line in &lines.all {
            add_own_counters(&mut values, &line.to_string());
        }
        values.remove("inner-secs");
        Ok(values)
    }

    fn daemon(&self, lab: &Lab) -> Fallible<Values> {
        let _ = std::fs::remove_file(self.socket());
        let mut qsd = Qsd::start(&self.folder, &[], &[])?;
        open_chain(&mut qsd, lab, self.work, file_node(Path::new(&lab.path("base"))))?;
        let address =
            json!({"addr": {"type": "unix", "data": {"path": self.socket().display().to_string()}}});
        qsd.monitor.execute("nbd-server-start", address)?;
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "", "writable": true});
        qsd.monitor.execute("block-export-add", export)?;
        let client = self.client()?;
        let (command, arguments) = command_of(self.work);
        let (began, cpu) = (Instant::now(), qsd.daemon.cpu_secs()?);
        qsd.monitor.execute(command, arguments)?;
        let ended = qsd.monitor.event(&["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"], began + PATIENCE)?;
        let mut values = Values::new();
        self.note(&mut values, began, ended.is_some(), &qsd.daemon, cpu)?;
        client.end(&mut values)?;
        values.insert("rss-mib".to_owned(), qsd.daemon.rss_mib_max()?);
        if self.work == Work::Active {
            qsd.cancel("j")?;
        }
        Ok(values)
    }

    fn note(
        &self,
        values: &mut Values,
        began: Instant,
        ended: bool,
        server: &Daemon,
        cpu: f64,
    ) -> Fallible<()> {
        values.insert("ready-secs".to_owned(), began.elapsed().as_secs_f64());
        values.insert("is-ready".to_owned(), f64::from(u8::from(ended)));
        values.insert("cpu-secs".to_owned(), server.cpu_secs()? - cpu);
        Ok(())
    }
}

fn rest() -> Fallible<()> {
    let end = Instant::now() + IDLE;
    while Instant::now() < end {
        stop::check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
