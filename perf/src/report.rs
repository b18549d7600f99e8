//! Tables and charts of results, for people: what ran, what it was made of, and how ours compares with the best of the
//! others, with the uncertainty of that.
//!
//! In a Markdown file the report replaces what stands between two marks, or is appended with them. Charts are SVG files
//! in a folder, and the Markdown shows them when both lie in one place.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::Fallible;
use crate::result::{Machine, Results, Role, Sample};
use crate::scenarios::{Better, EVERY_CASE, Goal, Kind, SCENARIOS, Scenario};
use crate::stats::{Ratio, Spread, ratio, spread};
use crate::svg::{self, Bar, Point, number};

const BEGIN: &str = "<!-- results begin; made by `blockferry-perf report` -->";
const END: &str = "<!-- results end -->";

/// What to report, and where to.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// Files that `run --json` wrote
    #[arg(value_name = "RESULTS", required = true)]
    results: Vec<PathBuf>,
    /// Put the tables into this file, between its marks or at its end [default: standard output]
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Put charts into this folder, one for each table that has one
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

/// Runs the command.
pub fn main(args: &ReportArgs) -> Fallible<()> {
    let mut results = Results::default();
    for path in &args.results {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| format!("'{name}': {error}"))?;
        results.add(&text).map_err(|error| format!("'{name}': {error}"))?;
    }
    let report = report(&results);
    if let Some(folder) = &args.svg {
        std::fs::create_dir_all(folder)?;
        for (name, chart) in &report.charts {
            std::fs::write(folder.join(name), chart)?;
        }
    }
    let place = args.svg.as_deref().and_then(|folder| relative(args.markdown.as_deref()?.parent()?, folder));
    let text = report.markdown(place.as_deref());
    match &args.markdown {
        None => print!("{text}"),
        Some(path) => {
            let before = std::fs::read_to_string(path).unwrap_or_default();
            std::fs::write(path, put_between(&before, &text))?;
        }
    }
    Ok(())
}

/// The way from one folder to another inside of it.
fn relative(from: &Path, to: &Path) -> Option<String> {
    let (from, to) = (std::fs::canonicalize(absolute(from)).ok()?, std::fs::canonicalize(to).ok()?);
    let rest = to.strip_prefix(from).ok()?.display().to_string();
    Some(if rest.is_empty() { rest } else { format!("{rest}/") })
}

fn absolute(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

fn put_between(before: &str, text: &str) -> String {
    let body = format!("{BEGIN}\n\n{text}\n{END}");
    match (before.find(BEGIN), before.find(END)) {
        (Some(from), Some(to)) if from < to => {
            format!("{}{body}{}", &before[..from], &before[to + END.len()..])
        }
        _ => format!("{}\n\n{body}\n", before.trim_end()),
    }
}

/// A report that is made and not written yet.
#[derive(Debug, Default)]
struct Report {
    head: String,
    /// Text, and the chart that belongs under it.
    parts: Vec<(String, Option<String>)>,
    charts: BTreeMap<String, String>,
}

impl Report {
    fn markdown(&self, charts_at: Option<&str>) -> String {
        let mut text = self.head.clone();
        for (part, chart) in &self.parts {
            text.push_str(part);
            if let (Some(chart), Some(place)) = (chart, charts_at) {
                let _ = writeln!(text, "![{}]({place}{chart})\n", chart.trim_end_matches(".svg"));
            }
        }
        text
    }
}

fn report(results: &Results) -> Report {
    let mut report = Report { head: machines(&results.machines), ..Report::default() };
    let mut verdicts = String::new();
    for scenario in SCENARIOS {
        let samples: Vec<&Sample> = results.samples.iter().filter(|s| s.scenario == scenario.name).collect();
        if samples.is_empty() {
            continue;
        }
        let _ = write!(verdicts, "{}", goals(scenario, &samples));
        report
            .parts
            .push((format!("### {}\n\n`{}`. {}\n\n", scenario.title, scenario.name, scenario.what), None));
        let cases = cases(&samples);
        for case in &cases {
            let rows = rows(&samples, case);
            let heading = if case.is_empty() { String::new() } else { format!("#### {}\n\n", capital(case)) };
            let mut text = heading + &table(scenario, &rows);
            if let Kind::Live(_) = scenario.kind {
                text += &live_verdicts(&rows, &self::rows(&samples, "no client"));
            }
            // Command lines differ from case to case only in what the heading says.
            if cases.last() == Some(case) {
                text += &commands(&rows);
            }
            let chart = chart(scenario, case, &rows, &samples).map(|(name, svg)| {
                report.charts.insert(name.clone(), svg);
                name
            });
            report.parts.push((text, chart));
        }
    }
    verdicts += &memory_verdict(&results.samples);
    if !verdicts.is_empty() {
        let header = "| scenario | goal | ours against the best of the others, pair by pair | with | |\n|---|---|---|---|---|\n";
        let _ = write!(report.head, "### Goals\n\n{header}{verdicts}\n");
    }
    report
}

/// The cases that were run, in order.
fn cases(samples: &[&Sample]) -> Vec<String> {
    let mut cases: Vec<String> = Vec::new();
    for sample in samples {
        if !cases.contains(&sample.case) {
            cases.push(sample.case.clone());
        }
    }
    cases
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().collect::<String>() + chars.as_str())
}

fn machines(machines: &[Machine]) -> String {
    let mut text = String::new();
    for machine in machines {
        text.push_str("| measured on | |\n|---|---|\n");
        for (name, value) in &machine.facts {
            let _ = writeln!(text, "| {name} | {} |", cell(value));
        }
        text.push('\n');
    }
    text
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// One contender of a table.
struct Row<'a> {
    name: &'a str,
    role: Role,
    command: &'a str,
    /// By round; 0 is the warm-up.
    rounds: BTreeMap<usize, &'a BTreeMap<String, f64>>,
}

impl Row<'_> {
    fn values(&self, metric: &str) -> Vec<f64> {
        let timed = self.rounds.iter().filter(|(round, _)| **round > 0);
        timed.filter_map(|(_, values)| values.get(metric).copied()).collect()
    }

    fn spread(&self, metric: &str) -> Option<Spread> {
        spread(&self.values(metric))
    }

    /// Counts come from the round of warming up, where they were taken.
    fn count(&self, metric: &str) -> Option<f64> {
        self.rounds.get(&0).and_then(|values| values.get(metric).copied())
    }
}

fn rows<'a>(samples: &[&'a Sample], case: &str) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.case == case) {
        let at = rows.iter().position(|row| row.name == sample.contender).unwrap_or_else(|| {
            rows.push(Row {
                name: &sample.contender,
                role: sample.role,
                command: &sample.command,
                rounds: BTreeMap::new(),
            });
            rows.len() - 1
        });
        rows[at].rounds.insert(sample.round, &sample.values);
    }
    rows
}

/// Ours over the other, pair by pair.
fn compare(ours: &Row, other: &Row, metric: &str) -> Option<Ratio> {
    let of = |row: &Row, round: &usize| row.rounds.get(round).and_then(|values| values.get(metric).copied());
    let rounds = ours.rounds.keys().filter(|round| **round > 0);
    ratio(rounds.map(|round| (of(ours, round), of(other, round))))
}

fn shown(ratio: Option<Ratio>) -> String {
    match ratio {
        None => "–".to_owned(),
        Some(ratio) if ratio.pairs < 3 => number(ratio.median),
        Some(ratio) => format!(
            "{} [{}..{}]{}",
            number(ratio.median),
            number(ratio.low),
            number(ratio.high),
            if ratio.is_equal() { " equal" } else { "" }
        ),
    }
}

/// A column: name, values, how to show them.
struct Column {
    title: &'static str,
    metric: &'static str,
    show: Show,
}

#[derive(Clone, Copy)]
enum Show {
    /// Median and extremes.
    Spread,
    /// Median alone.
    Median,
    /// What was counted in the round of warming up.
    Count,
}

const fn column(title: &'static str, metric: &'static str, show: Show) -> Column {
    Column { title, metric, show }
}

const COPY: &[Column] = &[
    column("wall s", "wall-secs", Show::Spread),
    column("MiB/s", "mib-a-sec", Show::Median),
    column("process CPU s/GiB", "cpu-secs-a-gib", Show::Spread),
    column("machine busy s/GiB", "busy-secs-a-gib", Show::Median),
    column("syscalls/GiB", "syscalls-a-gib", Show::Count),
    column("switches/GiB", "switches-a-gib", Show::Median),
    column("peak RSS MiB", "rss-mib", Show::Median),
];

const SERVE: &[Column] = &[
    column("IOPS", "iops", Show::Spread),
    column("p50 ms", "p50-ms", Show::Median),
    column("p99 ms", "p99-ms", Show::Median),
    column("p99.9 ms", "p99.9-ms", Show::Median),
    column("CPU µs/IO", "cpu-us-an-io", Show::Spread),
    column("machine busy µs/IO", "busy-us-an-io", Show::Median),
    column("syscalls/IO", "syscalls-an-io", Show::Count),
    column("switches/IO", "switches-an-io", Show::Count),
    column("peak RSS MiB", "rss-mib", Show::Median),
];

const LIVE: &[Column] = &[
    column("client p50 ms", "p50-ms", Show::Median),
    column("p99 ms", "p99-ms", Show::Spread),
    column("p99.9 ms", "p99.9-ms", Show::Median),
    column("client IOPS", "iops", Show::Median),
    column("ready after s", "ready-secs", Show::Spread),
    column("became ready", "is-ready", Show::Median),
    column("copied/size", "copied-to-size", Show::Median),
    column("CPU s", "cpu-secs", Show::Median),
    column("peak RSS MiB", "rss-mib", Show::Median),
];

const OURS: &[(&str, &str)] = &[
    ("fixed-share", "fixed share"),
    ("enters-per-1000", "enters per 1,000 operations"),
    ("batch-mean", "mean batch"),
    ("batch-max", "largest batch"),
    ("allocations-an-operation", "heap allocations an operation"),
];

fn table(scenario: &Scenario, rows: &[Row]) -> String {
    let (columns, metrics): (&[Column], &[(&str, &str)]) = match scenario.kind {
        Kind::Copy(_) | Kind::Remote(_) | Kind::Convert | Kind::Merge => {
            (COPY, &[("wall-secs", "wall: ours/this"), ("cpu-secs-a-gib", "CPU: ours/this")])
        }
        Kind::Nbd | Kind::Node | Kind::Gluster | Kind::Qcow2Node => {
            (SERVE, &[("iops", "IOPS: ours/this"), ("cpu-us-an-io", "CPU: ours/this")])
        }
        Kind::Live(_) | Kind::MergeLive => (LIVE, &[]),
    };
    let used: Vec<&Column> =
        columns.iter().filter(|column| rows.iter().any(|row| !show(row, column).is_empty())).collect();
    let mut text = String::from("| contender |");
    for column in &used {
        let _ = write!(text, " {} |", column.title);
    }
    for (_, title) in metrics {
        let _ = write!(text, " {title} |");
    }
    let dashes = "---:|".repeat(used.len() + metrics.len());
    let _ = write!(text, " rounds |\n|---|{dashes}---:|\n");
    let ours = rows.iter().find(|row| row.role == Role::Ours);
    for row in rows {
        let name = if row.role == Role::Ours { format!("**{}**", row.name) } else { row.name.to_owned() };
        let _ = write!(text, "| {} |", cell(&name));
        for column in &used {
            let _ = write!(text, " {} |", show(row, column));
        }
        for (metric, _) in metrics {
            let ratio =
                ours.filter(|ours| ours.name != row.name).map(|ours| shown(compare(ours, row, metric)));
            let _ = write!(text, " {} |", ratio.unwrap_or_default());
        }
        let _ = writeln!(text, " {} |", row.rounds.keys().filter(|round| **round > 0).count());
    }
    text.push('\n');
    for row in rows.iter().filter(|row| row.role == Role::Ours) {
        let counters: Vec<String> = OURS
            .iter()
            .filter_map(|(metric, words)| Some(format!("{words} {}", number(row.spread(metric)?.median))))
            .collect();
        if !counters.is_empty() {
            let _ = writeln!(text, "- {}: {}", row.name, counters.join(", "));
        }
    }
    text.push('\n');
    text
}

fn show(row: &Row, column: &Column) -> String {
    let spread = row.spread(column.metric);
    match column.show {
        Show::Count => row.count(column.metric).map_or(String::new(), number),
        Show::Median => spread.map_or(String::new(), |spread| number(spread.median)),
        Show::Spread => spread.map_or(String::new(), |s| match s.count {
            1 => number(s.median),
            _ => format!("{} ({}..{})", number(s.median), number(s.min), number(s.max)),
        }),
    }
}

fn commands(rows: &[Row]) -> String {
    let mut text = String::from("<details><summary>Command lines</summary>\n\n");
    for row in rows {
        let _ = writeln!(text, "- {}: `{}`", row.name, row.command);
    }
    text + "\n</details>\n\n"
}

/// The best of those that a goal compares with.
fn best<'a, 'b>(goal: &Goal, rows: &'b [Row<'a>]) -> Option<&'b Row<'a>> {
    let fit = rows.iter().filter(|row| row.role == goal.against && row.name.contains(goal.among));
    let ranked = fit.filter_map(|row| Some((row.spread(goal.metric)?.median, row)));
    let by_median = |a: &(f64, &Row), b: &(f64, &Row)| a.0.total_cmp(&b.0);
    match goal.better {
        Better::Less => ranked.min_by(by_median).map(|(_, row)| row),
        Better::More => ranked.max_by(by_median).map(|(_, row)| row),
    }
}

fn goals(scenario: &Scenario, samples: &[&Sample]) -> String {
    let mut text = String::new();
    let of_each = |goal: &Goal| match goal.case {
        EVERY_CASE => cases(samples),
        case => vec![case.to_owned()],
    };
    let all = scenario.goals.iter().flat_map(|goal| of_each(goal).into_iter().map(move |case| (goal, case)));
    for (goal, case) in all {
        let rows = rows(samples, &case);
        let Some(other) = best(goal, &rows) else { continue };
        for ours in rows.iter().filter(|row| row.role == Role::Ours) {
            let Some(ratio) = compare(ours, other, goal.metric) else { continue };
            let place = match case.as_str() {
                "" => scenario.name.to_owned(),
                case => format!("{}: {case}", scenario.name),
            };
            let default =
                rows.iter().find(|row| row.role == Role::Ours).is_some_and(|first| first.name == ours.name);
            let who = if default { String::new() } else { format!(" ({})", ours.name) };
            let _ = writeln!(
                text,
                "| {place}{who} | {}: {} {} | {} at {:.1} % | {} | {} |",
                goal.words,
                if goal.better == Better::Less { "≤" } else { "≥" },
                number(goal.ratio),
                shown(Some(ratio)),
                ratio.coverage * 100.0,
                cell(other.name),
                verdict(goal, &ratio)
            );
        }
    }
    text
}

/// Most memory that ours ever had, of all that was measured.
fn memory_verdict(samples: &[Sample]) -> String {
    const RSS_MIB_MAX: f64 = 64.0;
    let ours = samples.iter().filter(|sample| sample.role == Role::Ours);
    let peaks = ours.filter_map(|sample| Some((*sample.values.get("rss-mib")?, sample)));
    let Some((peak, sample)) = peaks.max_by(|a, b| a.0.total_cmp(&b.0)) else { return String::new() };
    format!(
        "| all | peak resident memory, arena included: ≤ {RSS_MIB_MAX} MiB | {} MiB | most in {}, {} | {} |\n",
        number(peak),
        sample.scenario,
        cell(&sample.contender),
        if peak <= RSS_MIB_MAX { "reached" } else { "missed" }
    )
}

/// What a client beside a mirror has to say, setting by setting, in medians.
fn live_verdicts(rows: &[Row], unhindered: &[Row]) -> String {
    let median = |row: &Row, metric: &str| Some(row.spread(metric)?.median);
    let ready = |row: &&Row| median(row, "is-ready").is_some_and(|ready| ready > 0.5);
    let of = |role: Role| rows.iter().filter(move |row| row.role == role);
    let mut text = String::new();
    let default = of(Role::Ours).find(|row| row.name.ends_with("default"));
    if let Some(default) = default {
        let idle = of(Role::Baseline).filter_map(|row| median(row, "p99-ms")).fold(f64::MAX, f64::min);
        if let Some(p99) = median(default, "p99-ms").filter(|_| idle < f64::MAX) {
            let _ = writeln!(
                text,
                "- our default's p99 is {} times the smaller idle one (goal: 2)",
                number(p99 / idle)
            );
        }
        let same = unhindered.iter().find(|row| row.name == default.name);
        let alone = same.and_then(|row| median(row, "ready-secs"));
        if let (Some(alone), Some(beside), true) =
            (alone, median(default, "ready-secs"), median(default, "p99-ms").is_some())
        {
            let speed = if ready(&default) {
                number(alone / beside)
            } else {
                "no part (it was not ready in time)".into()
            };
            let _ = writeln!(
                text,
                "- our default keeps {speed} of the speed that it has without a client (goal: 0.75)"
            );
        }
        let peers = of(Role::Peer).filter(ready).filter_map(|row| Some((median(row, "ready-secs")?, row)));
        if let (Some((secs, row)), Some(ours)) =
            (peers.min_by(|a, b| a.0.total_cmp(&b.0)), median(default, "ready-secs"))
        {
            let _ = writeln!(
                text,
                "- our default is ready after {} times the time of the fastest peer ({})",
                number(ours / secs),
                row.name
            );
        }
    }
    let point = |row: &Row| Some((median(row, "p99-ms")?, median(row, "ready-secs")?));
    let mut open: Vec<&str> = Vec::new();
    let mut beaten = 0;
    for peer in of(Role::Peer).filter(ready) {
        let Some((p99, secs)) = point(peer) else { continue };
        let better = |row: &Row| point(row).is_some_and(|ours| ours.0 <= p99 && ours.1 <= secs);
        if of(Role::Ours).filter(ready).any(better) { beaten += 1 } else { open.push(peer.name) }
    }
    if beaten + open.len() > 0 {
        let _ = writeln!(
            text,
            "- of {} settings of the peer that became ready, {beaten} have one of ours with no larger p99 that is ready no \
             later{}{}",
            beaten + open.len(),
            if open.is_empty() { "" } else { "; not so: " },
            open.join(", ")
        );
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// Whether a goal is reached. An interval that holds the goal decides by its median, and says so.
fn verdict(goal: &Goal, ratio: &Ratio) -> &'static str {
    let (reached, clear) = match goal.better {
        Better::Less => (ratio.median <= goal.ratio, ratio.high <= goal.ratio || ratio.low > goal.ratio),
        Better::More => (ratio.median >= goal.ratio, ratio.low >= goal.ratio || ratio.high < goal.ratio),
    };
    // Where the goal is to be no worse, what cannot be told apart has reached it.
    let as_good = goal.ratio == 1.0 && ratio.is_equal();
    match (reached || as_good, clear) {
        (true, true) => "reached",
        (true, false) => "reached, within the noise",
        (false, true) => "missed",
        (false, false) => "missed, within the noise",
    }
}

fn chart(scenario: &Scenario, case: &str, rows: &[Row], all: &[&Sample]) -> Option<(String, String)> {
    let slug: String = case
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect::<String>()
        .split('-')
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join("-");
    let name = if slug.is_empty() { scenario.name.to_owned() } else { format!("{}-{slug}", scenario.name) };
    let file = format!("performance-{name}.svg");
    if let Kind::Live(_) = scenario.kind {
        return live_chart(scenario, case, rows, all).map(|svg| (file, svg));
    }
    // Ten cases of servers would be ten charts: the two that have goals are enough.
    if !case.is_empty()
        && !scenario.goals.iter().any(|goal| goal.case == case && goal.metric == scenario.chart)
    {
        return None;
    }
    let columns = COPY.iter().chain(SERVE);
    let what = columns.clone().find(|column| column.metric == scenario.chart)?.title;
    let mut bars: Vec<Bar> = rows
        .iter()
        .filter_map(|row| {
            Some(Bar { label: row.name.to_owned(), role: row.role, spread: row.spread(scenario.chart)? })
        })
        .collect();
    if bars.is_empty() {
        return None;
    }
    let more = scenario.chart == "iops";
    bars.sort_by(|a, b| {
        let order = a.spread.median.total_cmp(&b.spread.median);
        if more { order.reverse() } else { order }
    });
    let title =
        if case.is_empty() { scenario.title.to_owned() } else { format!("{}: {case}", scenario.title) };
    let better = if more { "more is better" } else { "less is better" };
    Some((file, svg::bars(&title, &format!("{what}, median and span; {better}"), &bars)))
}

/// The client's tail against the time until the job is ready.
fn live_chart(scenario: &Scenario, case: &str, rows: &[Row], all: &[&Sample]) -> Option<String> {
    let median = |row: &Row, metric: &str| Some(row.spread(metric)?.median);
    let points: Vec<Point> = rows
        .iter()
        .filter(|row| median(row, "is-ready").is_some_and(|ready| ready > 0.5))
        .filter_map(|row| {
            let label = row.name.replace("blockferry, ", "").replace("QSD, ", "");
            let (x, y) = (median(row, "ready-secs")?, median(row, "p99-ms")?);
            Some(Point { marked: label == "default", label, role: row.role, x, y })
        })
        .collect();
    if points.is_empty() {
        return None;
    }
    let mut lines: Vec<(f64, String)> = Vec::new();
    for row in rows.iter().filter(|row| row.role == Role::Baseline) {
        lines.extend(median(row, "p99-ms").map(|p99| (p99, row.name.to_owned())));
    }
    let unhindered = self::rows(all, "no client");
    let unhindered =
        unhindered.iter().find(|row| row.role == Role::Ours).and_then(|row| median(row, "ready-secs"));
    let note =
        unhindered.map_or(String::new(), |secs| format!("; ours without a client: {} s", number(secs)));
    let title = format!("{}: {case}", scenario.title);
    let subtitle = format!("to the left and low is better{note}");
    Some(svg::scatter((&title, &subtitle), ("job ready after, seconds", "client p99, ms"), &points, &lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(contender: &str, role: Role, round: usize, wall: f64) -> Sample {
        Sample {
            scenario: "copy-zram".into(),
            case: String::new(),
            contender: contender.into(),
            role,
            command: format!("{contender} SRC DST"),
            round,
            values: [
                ("wall-secs".to_owned(), wall),
                ("cpu-secs-a-gib".to_owned(), 0.5),
                ("syscalls-a-gib".to_owned(), 7.0),
            ]
            .into(),
        }
    }

    fn results(ours: f64) -> Results {
        let mut samples = Vec::new();
        for round in 0..=6 {
            let noise = 1.0 + 0.01 * round as f64;
            samples.push(sample("blockferry mirror", Role::Ours, round, ours * noise));
            samples.push(sample("QSD mirror, slow", Role::Peer, round, 2.0 * noise));
            samples.push(sample("QSD mirror | fast", Role::Peer, round, noise));
            samples.push(sample("dd", Role::Peer, round, 0.1));
        }
        let machines = vec![Machine { facts: vec![("kernel".into(), "Linux".into())] }];
        Results { machines, samples }
    }

    #[test]
    fn goals_compare_with_the_best_that_they_name() {
        let text = report(&results(0.5)).markdown(None);
        let goal = text.lines().find(|line| line.starts_with("| copy-zram |")).unwrap();
        assert!(
            goal.contains("0.500 [0.500..0.500] at 96.9 %") && goal.contains("QSD mirror \\| fast"),
            "{goal}"
        );
        assert!(goal.ends_with("| reached |"), "{goal}");
        let text = report(&results(0.95)).markdown(None);
        assert!(text.contains("| missed |"), "{text}");
        let text = report(&results(1.0)).markdown(None);
        assert!(text.contains("1.00 [1.00..1.00] equal"), "{text}");
    }

    #[test]
    fn verdicts_know_noise() {
        let goal = find_goal("copy-zram-free");
        let ratio = |median: f64, low: f64, high: f64| Ratio { median, low, high, coverage: 0.97, pairs: 6 };
        assert_eq!(verdict(&goal, &ratio(0.9, 0.8, 0.95)), "reached");
        assert_eq!(verdict(&goal, &ratio(1.05, 0.8, 1.2)), "reached, within the noise");
        assert_eq!(verdict(&goal, &ratio(1.2, 1.1, 1.3)), "missed");
        let goal = find_goal("copy-zram");
        assert_eq!(verdict(&goal, &ratio(0.9, 0.8, 0.95)), "missed, within the noise");
    }

    fn find_goal(name: &str) -> Goal {
        crate::scenarios::find(name).unwrap().goals[0]
    }

    #[test]
    fn tables_have_as_many_cells_in_each_row() {
        let report = report(&results(0.5));
        let text = report.markdown(Some("figures/"));
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            if let Some(next) = lines.peek().filter(|next| line.starts_with('|') && next.starts_with('|')) {
                assert_eq!(cells(line), cells(next), "{line}\n{next}");
            }
        }
        assert!(text.contains("![performance-copy-zram](figures/performance-copy-zram.svg)"));
        assert_eq!(report.charts.len(), 1);
        assert!(text.contains("QSD mirror, slow SRC DST"));
    }

    #[test]
    fn live_settings_are_judged_on_both_axes() {
        let live = |contender: &str, role, values: &[(&str, f64)]| Sample {
            values: values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            ..sample(contender, role, 1, 0.0)
        };
        let all = [
            live("idle", Role::Baseline, &[("p99-ms", 0.2)]),
            live(
                "blockferry, default",
                Role::Ours,
                &[("p99-ms", 0.3), ("ready-secs", 1.0), ("is-ready", 1.0)],
            ),
            live("QSD, a", Role::Peer, &[("p99-ms", 7.0), ("ready-secs", 1.5), ("is-ready", 1.0)]),
            live("QSD, b", Role::Peer, &[("p99-ms", 0.2), ("ready-secs", 2.0), ("is-ready", 1.0)]),
            live("QSD, never", Role::Peer, &[("p99-ms", 0.1), ("ready-secs", 15.0), ("is-ready", 0.0)]),
        ];
        let samples: Vec<&Sample> = all.iter().collect();
        let alone = live("blockferry, default", Role::Ours, &[("ready-secs", 0.8)]);
        let text = live_verdicts(&rows(&samples, ""), &rows(&[&alone], ""));
        for part in [
            "1.50 times the smaller idle",
            "keeps 0.800",
            "0.667 times the time",
            "of 2 settings",
            "1 have",
            "not so: QSD, b",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(live_verdicts(&[], &[]), "");
    }

    #[test]
    fn the_report_goes_between_its_marks() {
        let first = put_between("# Head\n", "one");
        let second = put_between(&first, "two");
        assert!(second.starts_with("# Head\n") && second.contains("two") && !second.contains("one"));
        assert_eq!(put_between(&second, "two"), second);
    }
}
