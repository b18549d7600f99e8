//! Charts as SVG, by hand: bars with their spread, and points between two logarithmic axes. They have no background of
//! their own and take their colours from the reader's light or dark scheme.

use std::fmt::Write;

use crate::result::Role;
use crate::stats::Spread;

/// A number with three significant digits.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 || value == 0.0 || !size.is_finite() {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else {
        let digits = (2.0 - size.log10().floor()).min(6.0) as usize;
        format!("{value:.digits$}")
    }
}

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600;font-size:14px}.s{fill:#59636e}\
.ours{fill:#0969da}.peer{fill:#bc4c00}.buffered{fill:#9a6700}.limit{fill:#59636e}.baseline{fill:#1a7f37}\
.w{stroke:#1f2328;stroke-width:1.2}.g{stroke:#d1d9e0;stroke-width:1}.halo{fill:none;stroke:#0969da;stroke-width:1.5}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.s{fill:#9198a1}.ours{fill:#4493f8}.peer{fill:#db6d28}\
.buffered{fill:#d29922}.limit{fill:#9198a1}.baseline{fill:#3fb950}.w{stroke:#f0f6fc}.g{stroke:#3d444d}\
.halo{stroke:#4493f8}}";

fn class(role: Role) -> &'static str {
    match role {
        Role::Ours => "ours",
        Role::Peer => "peer",
        Role::Buffered => "buffered",
        Role::Limit => "limit",
        Role::Baseline => "baseline",
    }
}

fn legend(roles: &[Role], svg: &mut String, x: f64, y: f64) {
    let mut at = x;
    for role in [Role::Ours, Role::Peer, Role::Buffered, Role::Limit, Role::Baseline] {
        if !roles.contains(&role) {
            continue;
        }
        let (class, word) = match role {
            Role::Ours => ("ours", "Blockferry"),
            Role::Peer => ("peer", "peer"),
            Role::Buffered => ("buffered", "peer, page cache"),
            Role::Limit => ("limit", "bare loop: what the kernel allows"),
            Role::Baseline => ("baseline", "without a job"),
        };
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{at:.0}\" y=\"{:.0}\" width=\"10\" height=\"10\"/>",
            y - 9.0
        );
        let _ = write!(svg, "<text class=\"s\" x=\"{:.0}\" y=\"{y:.0}\">{word}</text>", at + 14.0);
        at += 26.0 + 6.6 * word.chars().count() as f64;
    }
}

/// Text as XML has it.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn open(width: f64, height: f64, title: &str, subtitle: &str) -> String {
    // Writing to a string does not fail, here and below.
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" role=\"img\"><title>{}</title><style>{STYLE}</style>",
        escape(title)
    );
    let _ = write!(svg, "<text class=\"t\" x=\"8\" y=\"20\">{}</text>", escape(title));
    let _ = write!(svg, "<text class=\"s\" x=\"8\" y=\"38\">{}</text>", escape(subtitle));
    svg
}

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    pub label: String,
    pub role: Role,
    pub spread: Spread,
}

/// Horizontal bars from zero, each with a line from its smallest to its largest value. A few values that dwarf all
/// others are cut off, and say so.
pub fn bars(title: &str, subtitle: &str, bars: &[Bar]) -> String {
    const WIDTH: f64 = 860.0;
    const LEFT: f64 = 350.0;
    const ROW: f64 = 24.0;
    let top = 52.0;
    let height = top + ROW * bars.len() as f64 + 34.0;
    let mut medians: Vec<f64> = bars.iter().map(|bar| bar.spread.median).collect();
    medians.sort_by(f64::total_cmp);
    let middle = medians.get(medians.len() / 2).copied().unwrap_or(1.0);
    let largest = bars.iter().map(|bar| bar.spread.max).fold(0.0, f64::max);
    let end = if largest > 4.0 * middle { 4.0 * middle } else { largest }.max(f64::MIN_POSITIVE);
    let room = WIDTH - LEFT - 90.0;
    let x = |value: f64| LEFT + room * (value / end).min(1.0);
    let mut svg = open(WIDTH, height, title, subtitle);
    for (i, bar) in bars.iter().enumerate() {
        let y = top + ROW * i as f64;
        let spread = bar.spread;
        let _ = write!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + 14.0,
            escape(&bar.label)
        );
        let _ = write!(
            svg,
            "<rect class=\"{}\" x=\"{LEFT:.0}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" rx=\"2\"/>",
            class(bar.role),
            y + 3.0,
            x(spread.median) - LEFT
        );
        let cut = spread.median > end;
        if !cut {
            let _ = write!(
                svg,
                "<line class=\"w\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{m:.1}\" y2=\"{m:.1}\"/>",
                x(spread.min),
                x(spread.max),
                m = y + 10.0
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\">{}{}</text>",
            x(if cut { end } else { spread.max.min(end) }) + 6.0,
            y + 14.0,
            if cut { "→ " } else { "" },
            number(spread.median)
        );
    }
    let roles: Vec<Role> = bars.iter().map(|bar| bar.role).collect();
    legend(&roles, &mut svg, 8.0, height - 10.0);
    svg.push_str("</svg>\n");
    svg
}

/// One point, with a short label.
#[derive(Clone, Debug)]
pub struct Point {
    pub label: String,
    pub role: Role,
    pub x: f64,
    pub y: f64,
    /// Drawn with a ring around it.
    pub marked: bool,
}

/// Ticks of a logarithmic axis: 1, 2 and 5 of every decade, one more than needed at each end.
pub fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let mut ticks = Vec::new();
    let first = low.log10().floor() as i32;
    let last = high.log10().ceil() as i32;
    for decade in first..=last {
        ticks.extend([1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)));
    }
    let start = ticks.iter().rposition(|tick| *tick <= low).unwrap_or(0);
    let end = ticks.iter().position(|tick| *tick >= high).unwrap_or(ticks.len() - 1);
    ticks[start..=end.max(start)].to_vec()
}

/// Points between logarithmic axes; `lines` are heights that are drawn across, with a label.
pub fn scatter(
    (title, subtitle): (&str, &str),
    (x_name, y_name): (&str, &str),
    points: &[Point],
    lines: &[(f64, String)],
) -> String {
    const WIDTH: f64 = 860.0;
    const HEIGHT: f64 = 520.0;
    const LEFT: f64 = 70.0;
    const TOP: f64 = 56.0;
    let (right, bottom) = (WIDTH - 30.0, HEIGHT - 76.0);
    let mut svg = open(WIDTH, HEIGHT, title, subtitle);
    let good: Vec<&Point> = points.iter().filter(|point| point.x > 0.0 && point.y > 0.0).collect();
    let span = |values: &[f64]| {
        let low = values.iter().copied().fold(f64::MAX, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        log_ticks(low, high)
    };
    let heights: Vec<f64> = good.iter().map(|p| p.y).chain(lines.iter().map(|(y, _)| *y)).collect();
    let widths: Vec<f64> = good.iter().map(|p| p.x).collect();
    if !good.is_empty() {
        let (xs, ys) = (span(&widths), span(&heights));
        let place = |value: f64, ticks: &[f64], from: f64, to: f64| {
            let (low, high) = (ticks[0].ln(), ticks[ticks.len() - 1].ln());
            from + (to - from) * (value.ln() - low) / (high - low).max(f64::MIN_POSITIVE)
        };
        let px = |value: f64| place(value, &xs, LEFT, right);
        let py = |value: f64| place(value, &ys, bottom, TOP);
        for tick in &xs {
            let x = px(*tick);
            let _ =
                write!(svg, "<line class=\"g\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>");
            let _ = write!(
                svg,
                "<text class=\"s\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                plain(*tick)
            );
        }
        for tick in &ys {
            let y = py(*tick);
            let _ =
                write!(svg, "<line class=\"g\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
            let _ = write!(
                svg,
                "<text class=\"s\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                plain(*tick)
            );
        }
        for (height, label) in lines {
            let y = py(*height);
            let _ = write!(
                svg,
                "<line class=\"w\" stroke-dasharray=\"5 4\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            );
            let _ = write!(
                svg,
                "<text class=\"s\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                right - 4.0,
                y - 4.0,
                escape(label)
            );
        }
        let mut taken: Vec<(f64, f64)> = Vec::new();
        for point in &good {
            let (x, y) = (px(point.x), py(point.y));
            let _ =
                write!(svg, "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>", class(point.role));
            if point.marked {
                let _ = write!(svg, "<circle class=\"halo\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"9\"/>");
            }
            // Labels that would lie on each other move down.
            let mut at = (x, y + 4.0);
            while taken.iter().any(|other| (other.0 - at.0).abs() < 190.0 && (other.1 - at.1).abs() < 12.0) {
                at.1 += 6.0;
            }
            taken.push(at);
            let to_left = x > right - 200.0;
            let (dx, anchor) = if to_left { (-12.0, "end") } else { (12.0, "start") };
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                at.0 + dx,
                at.1,
                escape(&point.label)
            );
        }
    }
    let _ = write!(
        svg,
        "<text class=\"s\" x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        bottom + 34.0,
        escape(x_name)
    );
    let _ = write!(svg, "<text class=\"s\" x=\"8\" y=\"{:.1}\">{}</text>", TOP - 6.0, escape(y_name));
    let roles: Vec<Role> = points.iter().map(|point| point.role).collect();
    legend(&roles, &mut svg, 8.0, HEIGHT - 12.0);
    svg.push_str("</svg>\n");
    svg
}

/// A tick as people write it.
fn plain(value: f64) -> String {
    let digits = (-value.log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tags open and close in order, and attributes are quoted.
    fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        for piece in svg.split('<').skip(1) {
            let (tag, _) = piece.split_once('>').expect("a tag ends");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    fn bar(label: &str, median: f64) -> Bar {
        let spread = Spread { median, min: median * 0.9, max: median * 1.1, count: 5 };
        Bar { label: label.into(), role: Role::Peer, spread }
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1234.5, "1234"),
            (99.94, "99.9"),
            (9.876, "9.88"),
            (0.1234, "0.123"),
            (0.00123, "0.00123"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn bars_are_drawn() {
        let svg = bars(
            "A <title> & more",
            "s",
            &[bar("a\"b", 1.0), bar("c", 1.2), bar("d", 1.1), bar("far", 90.0)],
        );
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<rect class=\"peer\"").count(), 4 + 1, "bars and the legend");
        assert_eq!(svg.matches('→').count(), 1, "one is cut off");
        assert!(svg.contains("prefers-color-scheme:dark") && svg.contains("A &lt;title&gt; &amp; more"));
        assert_well_formed(&bars("nothing", "", &[]));
        assert_well_formed(&bars("zero", "", &[bar("a", 0.0)]));
    }

    #[test]
    fn points_are_drawn() {
        let point = |x, y| Point { label: "p".into(), role: Role::Ours, x, y, marked: true };
        let points = [point(1.0, 0.2), point(1.0, 0.2), point(3.0, 900.0), point(0.0, 1.0)];
        let svg = scatter(("t", "s"), ("x", "y"), &points, &[(0.17, "idle".into())]);
        assert_well_formed(&svg);
        assert_eq!(svg.matches("r=\"5\"").count(), 3, "what has no logarithm is left out");
        assert_well_formed(&scatter(("t", "s"), ("x", "y"), &[], &[]));
        assert_well_formed(&scatter(("t", "s"), ("x", "y"), &[point(1.0, 1.0)], &[]));
    }

    #[test]
    fn ticks_hold_what_they_are_for() {
        assert_eq!(log_ticks(0.3, 4.0), [0.2, 0.5, 1.0, 2.0, 5.0]);
        assert_eq!(log_ticks(1.0, 1.0).first(), Some(&1.0));
        assert_eq!(log_ticks(7.0, 80.0), [5.0, 10.0, 20.0, 50.0, 100.0]);
    }
}
