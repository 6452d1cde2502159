//! The picture of a run: panels over one axis of time, with a line at each decision. One file that needs no other, for
//! light and dark pages, in colours that the colour-blind can tell apart (Okabe and Ito's).

mod canvas;
mod labels;

use super::record::{Run, Sample, VersionSample};
use crate::rollout::Reason;
use crate::simulate::format::clock;
pub(super) use crate::simulate::format::number;
use canvas::{Anchor, Canvas, Path, Scale, round_up, time_step, width_of, wrapped};
use labels::{Label, place};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 936.0;
/// The title's left edge.
const EDGE: f64 = 24.0;
const ROW: f64 = 17.0;
/// From one panel to the next: room for a title.
const GAP: f64 = 34.0;
/// No more bars than this.
const MOST_BARS: usize = 300;
/// How many versions have a colour of their own.
const COLOURS: usize = 5;
/// The least evidence that is shown, as a power of ten.
const LEAST_EVIDENCE: f64 = -2.0;

const STYLE: &str = "\
text { font: 12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; fill: #24292f; }
text.title { font-size: 18px; font-weight: 600; }
text.words { font-size: 13px; }
text.panel { font-weight: 600; }
text.over { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }
text.axis, text.note { fill: #57606a; }
.page { fill: #ffffff; }
.grid { stroke: #d0d7de; stroke-width: 1; fill: none; }
.frame { stroke: #8c959f; stroke-width: 1; fill: none; }
.area { fill-opacity: 0.85; }
.away { fill: #8c959f; fill-opacity: 0.18; }
.mark { stroke: #57606a; stroke-width: 1; fill: none; }
.minor { stroke: #57606a; stroke-width: 1; stroke-opacity: 0.35; fill: none; }
.mark.bad { stroke: #c04000; stroke-width: 1.5; }
.mark.good { stroke: #00795a; stroke-width: 1.5; }
text.bad { fill: #b03a00; font-weight: 600; }
text.good { fill: #00694e; font-weight: 600; }
.fail { stroke: #d55e00; }
.pass { stroke: #009e73; }
.slow { stroke: #d55e00; stroke-dasharray: 2 2; }
.load { stroke: #57606a; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.bound { fill: none; stroke-width: 1.2; stroke-dasharray: 6 4; }
.f0 { fill: #56a0d3; } .f1 { fill: #e69f00; } .f2 { fill: #cc79a7; } .f3 { fill: #009e73; } .f4 { fill: #8c959f; }
.s0 { stroke: #0072b2; } .s1 { stroke: #d08c00; } .s2 { stroke: #b85c92; } .s3 { stroke: #009e73; } .s4 { stroke: #6e7781; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
text.axis, text.note { fill: #9da7b3; }
text.over { stroke: #0d1117; }
.page { fill: #0d1117; }
.grid { stroke: #2b323b; }
.frame { stroke: #6e7681; }
.mark, .minor, .load { stroke: #9da7b3; }
.mark.bad { stroke: #ff8a4c; }
.mark.good { stroke: #2fc39b; }
text.bad { fill: #ff9a66; }
text.good { fill: #3fd0a8; }
.fail, .slow { stroke: #ff8a4c; }
.pass { stroke: #2fc39b; }
.f0 { fill: #3f88bd; } .f1 { fill: #d99500; } .f2 { fill: #b56893; } .f3 { fill: #1f9e7c; } .f4 { fill: #6e7681; }
.s0 { stroke: #6cb6e8; } .s1 { stroke: #f0ad1f; } .s2 { stroke: #dd94be; } .s3 { stroke: #2fc39b; } .s4 { stroke: #9da7b3; }
}
";

/// The picture.
pub fn draw(run: &Run) -> String {
    let title = format!("{}: {}", run.rollout, run.headline());
    let mut picture = Picture { run, canvas: Canvas::default(), time: time(run), y: 0.0 };
    picture.draw(&title);
    let height = picture.y;
    let mut page = Canvas::default();
    page.rect("page", 0.0, 0.0, WIDTH, height);
    page.append(picture.canvas);
    page.finish(WIDTH, height, &title, &run.message, STYLE)
}

fn time(run: &Run) -> Scale {
    Scale { low: 0.0, high: run.duration_seconds.max(1.0), from: LEFT, to: RIGHT }
}

struct Picture<'r> {
    run: &'r Run,
    canvas: Canvas,
    time: Scale,
    /// Down to here everything is drawn.
    y: f64,
}

/// What a panel shows; of one service, by index, or of all.
#[derive(Clone, Copy)]
enum Shows {
    Shares(usize),
    Load,
    Failures,
    Evidence,
    Readiness(usize),
}

impl Shows {
    fn height(self) -> f64 {
        match self {
            Self::Shares(_) | Self::Evidence => 130.0,
            Self::Failures => 100.0,
            Self::Load | Self::Readiness(_) => 56.0,
        }
    }
}

/// Requests per second.
struct Rates {
    requests: f64,
    errors: f64,
}

/// A panel's place.
#[derive(Clone, Copy)]
struct Panel {
    shows: Shows,
    top: f64,
    bottom: f64,
}

impl Picture<'_> {
    fn draw(&mut self, title: &str) {
        self.heading(title);
        let (marks, rows) = self.marks();
        let labels_end = self.y + rows as f64 * ROW + 4.0;
        let panels = self.panels(labels_end + 22.0);
        let bottom = panels.last().map_or(labels_end, |last| last.bottom);
        for (from, to) in self.absences() {
            let (x, to) = (self.time.of(from), self.time.of(to));
            self.canvas.rect("away", x, labels_end, to - x, bottom - labels_end);
        }
        for panel in &panels {
            self.time_grid(panel);
            match panel.shows {
                Shows::Shares(service) => self.shares(panel, service),
                Shows::Load => self.load(panel),
                Shows::Failures => self.failures(panel),
                Shows::Evidence => self.evidence(panel),
                Shows::Readiness(service) => self.readiness(panel, service),
            }
        }
        self.draw_marks(&marks, labels_end, bottom);
        // Over the lines of the marks.
        panels.iter().for_each(|panel| self.title(panel));
        self.time_axis(bottom);
        self.y = bottom + 44.0;
    }

    fn heading(&mut self, title: &str) {
        self.canvas.text(EDGE, 34.0, "title", Anchor::Start, title);
        self.y = 34.0;
        let mut words = wrapped(&self.run.message, 13.0, RIGHT - EDGE);
        words.truncate(4);
        words.extend(self.run.started_at_seconds.map(|_| format!("{}.", self.run.users())));
        for line in words {
            self.y += 19.0;
            self.canvas.text(EDGE, self.y, "words", Anchor::Start, &line);
        }
        self.y += 28.0;
        let mut x = EDGE;
        let (names, shown) = (self.version_names(), self.shown());
        for (i, name) in shown.into_iter().filter_map(|i| Some((i, names.get(i)?.clone()))) {
            let role = match () {
                () if Some(&name) == self.run.target.as_ref() && self.run.stable == name => ", new stable version",
                () if Some(&name) == self.run.target.as_ref() => ", target",
                () if self.run.stable == name => ", stable",
                () => "",
            };
            self.canvas.rect(&format!("area f{}", i.min(COLOURS - 1)), x, self.y - 10.0, 12.0, 12.0);
            let text = format!("{name}{role}");
            self.canvas.text(x + 18.0, self.y, "", Anchor::Start, &text);
            x += 18.0 + width_of(&text, 12.0) + 22.0;
        }
        self.y += 10.0;
    }

    /// The versions, by index, that have anything to do with it.
    fn shown(&self) -> Vec<usize> {
        let has_part = |version: usize| {
            let samples = self.run.samples.iter().flat_map(|sample| &sample.services);
            samples.filter_map(|service| service.get(version)).any(|version| version.weight > 0.0)
        };
        let names = self.version_names();
        let is_named = |name: &String| *name == self.run.stable || Some(name) == self.run.target.as_ref();
        (0..names.len()).filter(|i| is_named(&names[*i]) || has_part(*i)).collect()
    }

    fn version_names(&self) -> Vec<String> {
        let first = self.run.services.first();
        first.map_or(Vec::new(), |service| service.versions.iter().map(|version| version.name.clone()).collect())
    }

    /// The versions by index, the target first: its share is then read from the axis.
    fn order(&self) -> Vec<usize> {
        let names = self.version_names();
        let mut order = self.shown();
        order.sort_by_key(|i| (Some(&names[*i]) != self.run.target.as_ref(), names.len() - i));
        order
    }

    fn panels(&self, mut top: f64) -> Vec<Panel> {
        let services = 0..self.run.services.len();
        let judged = self.run.samples.iter().any(|sample| sample.evidence.is_some());
        let shows = services.clone().map(Shows::Shares).chain(self.run.load_changes.then_some(Shows::Load));
        let shows = shows
            .chain([Shows::Failures])
            .chain(judged.then_some(Shows::Evidence))
            .chain(services.map(Shows::Readiness));
        let place = |shows: Shows| {
            let panel = Panel { shows, top, bottom: top + shows.height() };
            top = panel.bottom + GAP;
            panel
        };
        shows.map(place).collect()
    }

    fn title(&mut self, panel: &Panel) {
        let (title, service) = match panel.shows {
            Shows::Shares(service) => ("share of the requests, %", Some(service)),
            Shows::Load => ("requests per second", None),
            Shows::Failures => ("failed requests per second", None),
            Shows::Evidence => ("evidence that the target is", None),
            Shows::Readiness(service) => ("endpoints ready", Some(service)),
        };
        let several = self.run.services.len() > 1;
        let name = service.filter(|_| several).and_then(|service| self.run.services.get(service));
        let title = name.map_or(title.to_owned(), |service| format!("{}: {title}", service.name));
        let y = panel.top - 8.0;
        self.canvas.text(LEFT, y, "panel over", Anchor::Start, &title);
        let right = match panel.shows {
            Shows::Evidence => return self.evidence_legend(LEFT + width_of(&title, 12.0) * 1.08 + 24.0, y),
            Shows::Failures | Shows::Load => self.bars().0,
            _ => return,
        };
        if right > 1.0 {
            let words = format!("means of {} s", number(right));
            self.canvas.text(RIGHT, y, "note over", Anchor::End, &words);
        }
    }

    fn evidence_legend(&mut self, mut x: f64, y: f64) {
        let curves = [
            ("fail", "worse", true),
            ("slow", "slower", self.judges_latency()),
            ("pass", "good enough", self.asks_for_pass()),
        ];
        for (class, words, _) in curves.iter().filter(|(_, _, is_there)| *is_there) {
            self.canvas.line(&format!("curve {class}"), (x, y - 4.0), (x + 18.0, y - 4.0));
            self.canvas.text(x + 23.0, y, "over", Anchor::Start, words);
            x += 23.0 + width_of(words, 12.0) + 16.0;
        }
    }

    fn judges_latency(&self) -> bool {
        self.run.samples.iter().any(|sample| sample.latency_evidence.is_some())
    }

    fn asks_for_pass(&self) -> bool {
        self.run.samples.iter().any(|sample| sample.pass_evidence.is_some_and(|evidence| evidence > 0.0))
    }

    /// A horizontal line with its value.
    fn tick(&mut self, y: f64, label: &str) {
        self.canvas.line("grid", (LEFT, y), (RIGHT, y));
        self.canvas.text(LEFT - 8.0, y + 4.0, "axis", Anchor::End, label);
    }

    fn frame(&mut self, panel: &Panel) {
        self.canvas.line("frame", (LEFT, panel.bottom), (RIGHT, panel.bottom));
    }

    fn shares(&mut self, panel: &Panel, service: usize) {
        let scale = Scale { low: 0.0, high: 100.0, from: panel.bottom, to: panel.top };
        for percent in [0.0, 50.0, 100.0] {
            self.tick(scale.of(percent), &number(percent));
        }
        let order = self.order();
        for (place, version) in order.iter().enumerate() {
            let up_to = |sample: &Sample, places: usize| {
                let of = sample.services.get(service);
                let weight = |i: &usize| of.and_then(|of| of.get(*i)).map_or(0.0, |version| version.weight);
                order.iter().take(places).map(weight).sum::<f64>()
            };
            let area = self.area(&scale, |sample| up_to(sample, place), |sample| up_to(sample, place + 1));
            self.canvas.path(&format!("area f{}", (*version).min(COLOURS - 1)), &area);
        }
        self.frame(panel);
    }

    /// What lies between two values that change at samples.
    fn area(&self, scale: &Scale, low: impl Fn(&Sample) -> f64, high: impl Fn(&Sample) -> f64) -> Path {
        let mut path = Path::default();
        if self.run.samples.iter().all(|sample| high(sample) - low(sample) < 1e-9) {
            return path;
        }
        let top = self.steps(scale, &high);
        let Some((first, first_y)) = top.first().copied() else { return path };
        path.move_to(first, first_y);
        top.iter().skip(1).for_each(|(x, y)| path.step_to(*x, *y));
        path.step_to(RIGHT, top.last().map_or(first_y, |last| last.1));
        let bottom = self.steps(scale, &low);
        let mut x = RIGHT;
        for (from, y) in bottom.iter().rev() {
            path.line_to(x, *y);
            path.line_to(*from, *y);
            x = *from;
        }
        path.close();
        path
    }

    /// Where a value changes, and what it is from then on.
    fn steps(&self, scale: &Scale, value: impl Fn(&Sample) -> f64) -> Vec<(f64, f64)> {
        let points = self.run.samples.iter().map(|sample| (self.time.of(sample.at_seconds), scale.of(value(sample))));
        let mut steps: Vec<(f64, f64)> = points.collect();
        steps.dedup_by(|next, before| next.1 == before.1);
        steps
    }

    /// What was counted per second, of each version, from the beginning on in times of the same length, in seconds.
    fn bars(&self) -> (f64, Vec<Vec<Rates>>) {
        let regular: Vec<&Sample> = self.run.samples.iter().filter(|sample| sample.regular).collect();
        let versions = self.version_names().len();
        let each = regular.len().div_ceil(MOST_BARS).max(1);
        let seconds = each as f64 * self.run.sample_seconds;
        let mut ends: Vec<&Sample> = regular.into_iter().step_by(each).collect();
        ends.extend(self.run.samples.last().filter(|last| !last.regular));
        let sum = |sample: &Sample, version: usize, of: fn(&VersionSample) -> u64| -> u64 {
            sample.services.iter().filter_map(|service| service.get(version)).map(of).sum()
        };
        let bar = |pair: &[&Sample]| {
            let long = (pair[1].at_seconds - pair[0].at_seconds).max(1e-9);
            let rate = |version, of| (sum(pair[1], version, of) - sum(pair[0], version, of)) as f64 / long;
            let rates = |version| Rates {
                requests: rate(version, |version| version.requests),
                errors: rate(version, |version| version.errors),
            };
            (0..versions).map(rates).collect()
        };
        (seconds, ends.windows(2).map(bar).collect())
    }

    /// The axis of something that begins with 0.
    fn axis_from_zero(&mut self, panel: &Panel, most: f64, most_ticks: f64) -> Scale {
        let (high, step) = round_up(most, most_ticks);
        let scale = Scale { low: 0.0, high, from: panel.bottom, to: panel.top };
        for i in 0..=(high / step).round() as usize {
            self.tick(scale.of(i as f64 * step), &number(i as f64 * step));
        }
        scale
    }

    fn load(&mut self, panel: &Panel) {
        let (seconds, bars) = self.bars();
        let sums: Vec<f64> = bars.iter().map(|bar| bar.iter().map(|rates| rates.requests).sum()).collect();
        let scale = self.axis_from_zero(panel, sums.iter().copied().fold(1.0, f64::max), 2.0);
        let mut path = Path::default();
        for (i, sum) in sums.iter().enumerate() {
            match i {
                0 => path.move_to(LEFT, scale.of(*sum)),
                _ => path.step_to(self.time.of(i as f64 * seconds), scale.of(*sum)),
            }
        }
        if let Some(last) = sums.last() {
            path.step_to(RIGHT, scale.of(*last));
        }
        self.canvas.path("curve load", &path);
        self.frame(panel);
    }

    fn failures(&mut self, panel: &Panel) {
        let (seconds, bars) = self.bars();
        let most = bars.iter().map(|bar| bar.iter().map(|rates| rates.errors).sum()).fold(1.0, f64::max);
        let scale = self.axis_from_zero(panel, most, 3.0);
        let order = self.order();
        let mut paths: Vec<Path> = order.iter().map(|_| Path::default()).collect();
        for (i, bar) in bars.iter().enumerate() {
            let from = self.time.of(i as f64 * seconds);
            let to = self.time.of((i + 1) as f64 * seconds);
            let mut sum = 0.0;
            for (path, version) in paths.iter_mut().zip(&order) {
                let failed = bar[*version].errors;
                if failed > 0.0 {
                    let (top, bottom) = (scale.of(sum + failed), scale.of(sum));
                    path.bar(from, top, (to - from - 0.4).max(0.6), (bottom - top).max(0.5));
                    sum += failed;
                }
            }
        }
        for (path, version) in paths.iter().zip(&order) {
            self.canvas.path(&format!("f{}", (*version).min(COLOURS - 1)), path);
        }
        self.frame(panel);
    }

    fn evidence(&mut self, panel: &Panel) {
        let samples = &self.run.samples;
        let asks_for_pass = self.asks_for_pass();
        let bound = |of: fn(&Sample) -> Option<f64>| samples.iter().rev().find_map(of).unwrap_or(1_000.0);
        let (fail, pass) = (bound(|sample| sample.bound), bound(|sample| sample.pass_bound));
        let high = fail.max(pass).log10().ceil() + 1.0;
        let scale = Scale { low: LEAST_EVIDENCE, high, from: panel.bottom, to: panel.top };
        let mut power = LEAST_EVIDENCE;
        while power <= high {
            self.tick(scale.of(power), &number(10f64.powf(power)));
            power += 2.0;
        }
        let log = |evidence: f64| scale.of(evidence.max(1e-9).log10());
        let mut curves: Vec<(&str, Path)> = vec![("curve fail", self.curve(log, |sample| sample.evidence))];
        if asks_for_pass {
            curves.push(("curve pass", self.curve(log, |sample| sample.pass_evidence)));
        }
        curves.push(("curve slow", self.curve(log, |sample| sample.latency_evidence)));
        let mut bounds = vec![("bound fail", "bad", fail, "fails")];
        bounds.extend(asks_for_pass.then_some(("bound pass", "good", pass, "passes")));
        for (class, text, bound, what) in bounds {
            let y = log(bound);
            self.canvas.line(class, (LEFT, y), (RIGHT, y));
            let words = format!("{what} at {}", number(bound.round()));
            self.canvas.text(RIGHT, y - 4.0, &format!("{text} over"), Anchor::End, &words);
        }
        for (class, curve) in curves {
            self.canvas.path(class, &curve);
        }
        self.frame(panel);
    }

    /// A curve with gaps where there is no value.
    fn curve(&self, y: impl Fn(f64) -> f64, value: impl Fn(&Sample) -> Option<f64>) -> Path {
        let mut path = Path::default();
        let mut last: Option<(f64, f64)> = None;
        let mut pending = None;
        for sample in &self.run.samples {
            let Some(value) = value(sample) else {
                if let Some((x, y)) = pending.take() {
                    path.line_to(x, y);
                }
                last = None;
                continue;
            };
            let point = (self.time.of(sample.at_seconds), y(value));
            match last {
                None => path.move_to(point.0, point.1),
                // What is level needs no points in between.
                Some((_, before)) if before == point.1 => {
                    pending = Some(point);
                    continue;
                }
                Some(_) => {
                    if let Some((x, y)) = pending.take() {
                        path.line_to(x, y);
                    }
                    path.line_to(point.0, point.1);
                }
            }
            last = Some(point);
        }
        if let Some((x, y)) = pending {
            path.line_to(x, y);
        }
        path
    }

    fn readiness(&mut self, panel: &Panel, service: usize) {
        let versions = self.run.services.get(service).map_or(0, |service| service.versions.len());
        let most = self.run.services.get(service).into_iter().flat_map(|service| &service.versions);
        let most = f64::from(most.map(|version| version.endpoints).max().unwrap_or(1).max(1));
        // Room for the lines of versions that have the same number.
        let scale = Scale { low: 0.0, high: most, from: panel.bottom - 2.0, to: panel.top + 2.0 };
        for value in [0.0, most] {
            self.tick(scale.of(value), &number(value));
        }
        for version in self.shown() {
            let ready = |sample: &Sample| {
                let of = sample.services.get(service).and_then(|of| of.get(version));
                f64::from(of.map_or(0, |of| of.endpoints_ready))
            };
            let apart = 2.4 * (version as f64 - (versions as f64 - 1.0) / 2.0);
            let steps = self.steps(&scale, ready);
            let mut path = Path::default();
            for (i, (x, y)) in steps.iter().enumerate() {
                match i {
                    0 => path.move_to(*x, y + apart),
                    _ => path.step_to(*x, y + apart),
                }
            }
            if let Some((_, y)) = steps.last() {
                path.step_to(RIGHT, y + apart);
            }
            self.canvas.path(&format!("curve s{}", version.min(COLOURS - 1)), &path);
        }
    }

    /// Times without a controller.
    fn absences(&self) -> Vec<(f64, f64)> {
        let mut absences = Vec::new();
        let mut since = None;
        let samples = self.run.samples.iter().map(|sample| (sample.at_seconds, sample.controller));
        for (at, is_there) in samples.chain([(self.run.duration_seconds, true)]) {
            match (since, is_there) {
                (None, false) => since = Some(at),
                (Some(from), true) => {
                    absences.push((from, at));
                    since = None;
                }
                _ => {}
            }
        }
        absences
    }

    fn times(&self) -> impl Iterator<Item = f64> + use<> {
        let (all, step) = (self.run.duration_seconds, time_step(self.run.duration_seconds));
        (0..).map(move |i| f64::from(i) * step).take_while(move |at| *at <= all + 1e-9)
    }

    fn time_grid(&mut self, panel: &Panel) {
        for at in self.times() {
            let x = self.time.of(at);
            self.canvas.line("grid", (x, panel.top), (x, panel.bottom));
        }
    }

    fn time_axis(&mut self, y: f64) {
        for at in self.times() {
            let x = self.time.of(at);
            self.canvas.line("frame", (x, y), (x, y + 4.0));
            self.canvas.text(x, y + 18.0, "axis", Anchor::Middle, clock(at).trim_end_matches(".0"));
        }
        let words = if self.run.duration_seconds < 3_600.0 { "minutes:seconds" } else { "hours:minutes:seconds" };
        self.canvas.text(LEFT, y + 34.0, "note", Anchor::Start, words);
    }

    /// The decisions, with their labels placed.
    fn marks(&self) -> (Vec<Mark>, usize) {
        let mut marks: Vec<Mark> = Vec::new();
        let mut was_trouble = false;
        for transition in &self.run.transitions {
            let kind = Kind::of(transition.reason);
            let text = match transition.reason {
                Reason::Started | Reason::StepStarted => transition.weight.map(|weight| format!("{weight} %")),
                Reason::Holding | Reason::Ramping if was_trouble => Some("goes on".to_owned()),
                reason => word(reason).map(str::to_owned),
            };
            was_trouble = match kind {
                Kind::Trouble => true,
                _ => was_trouble && text.is_none(),
            };
            let Some(text) = text else { continue };
            let x = self.time.of(transition.at_seconds);
            // One line where several would be one on top of the other.
            if let Some(last) = marks.last_mut().filter(|last| x - last.label.x < 3.0) {
                last.told.push_str(&format!("\n{}: {}", clock(transition.at_seconds), transition.message));
                last.label.text = match (last.kind, kind) {
                    (Kind::Step, Kind::Trouble) => format!("{}: {text}", last.label.text),
                    (before, now) if now.weight() > before.weight() => text,
                    _ => continue,
                };
                last.kind = if kind == Kind::Trouble { last.kind } else { kind };
                last.label.weight = last.kind.weight();
                continue;
            }
            let told = format!("{}: {}", clock(transition.at_seconds), transition.message);
            marks.push(Mark { label: Label::new(x, text, kind.weight()), kind, told });
        }
        for (from, to) in self.absences() {
            let told = format!("{}: the controller is away until {}", clock(from), clock(to));
            let label = Label::new(self.time.of(from), "controller away".to_owned(), Kind::Trouble.weight());
            marks.push(Mark { label, kind: Kind::Trouble, told });
        }
        let mut labels: Vec<Label> = marks.iter().map(|mark| mark.label.clone()).collect();
        let rows = place(&mut labels, RIGHT + 16.0);
        marks.iter_mut().zip(labels).for_each(|(mark, label)| mark.label = label);
        (marks, rows)
    }

    fn draw_marks(&mut self, marks: &[Mark], labels_end: f64, bottom: f64) {
        for mark in marks {
            let Label { x, text, row, left, .. } = &mark.label;
            let class = match (row, mark.kind) {
                (None, _) => "minor",
                (_, Kind::Bad) => "mark bad",
                (_, Kind::Good) => "mark good",
                _ => "mark",
            };
            let text_class = match mark.kind {
                Kind::Bad => "bad",
                Kind::Good => "good",
                _ => "",
            };
            self.canvas.told(&mark.told, |canvas| {
                let top = row.map_or(labels_end, |row| labels_end - (row + 1) as f64 * ROW);
                canvas.line(class, (*x, top + 2.0), (*x, bottom));
                if row.is_some() {
                    let (x, anchor) = match left {
                        true => (x - labels::GAP, Anchor::End),
                        false => (x + labels::GAP, Anchor::Start),
                    };
                    canvas.text(x, top + 13.0, &format!("{text_class} over"), anchor, text);
                }
            });
        }
    }
}

/// A decision in the picture.
struct Mark {
    label: Label,
    kind: Kind,
    /// Everything that is said of it, for those who point at it.
    told: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Good,
    Bad,
    Trouble,
    Step,
    Other,
}

impl Kind {
    fn of(reason: Reason) -> Self {
        match reason {
            Reason::Completed => Self::Good,
            Reason::VerdictFail
            | Reason::TooManyErrors
            | Reason::Aborted
            | Reason::RolledBack
            | Reason::TargetWithdrawn => Self::Bad,
            Reason::GateClosed
            | Reason::WarmingUp
            | Reason::WaitingForCapacity
            | Reason::ProgressDeadlineExceeded
            | Reason::EndpointsLost
            | Reason::Undecided
            | Reason::GuardVeto
            | Reason::NoProxies
            | Reason::ProxiesBehind
            | Reason::NotRouted
            | Reason::NoGoodAnswer
            | Reason::BothFailing => Self::Trouble,
            Reason::Started | Reason::StepStarted | Reason::Superseded | Reason::StepsChanged => Self::Step,
            _ => Self::Other,
        }
    }

    fn weight(self) -> u8 {
        match self {
            Self::Good | Self::Bad => 3,
            Self::Step => 2,
            Self::Trouble => 1,
            Self::Other => 0,
        }
    }
}

/// A reason in a word or two; none where it goes without saying.
fn word(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::Serving | Reason::Holding | Reason::Ramping | Reason::CatchingUp => return None,
        Reason::Started => "start",
        Reason::StepStarted => "next step",
        Reason::Superseded => "another target",
        Reason::TargetWithdrawn => "target withdrawn",
        Reason::GateClosed => "gate closed",
        Reason::WarmingUp => "warms up",
        Reason::WaitingForCapacity => "waits for endpoints",
        Reason::ProgressDeadlineExceeded => "stuck",
        Reason::EndpointsLost => "endpoints lost",
        Reason::EndpointsBack => "endpoints back",
        Reason::StepsChanged => "steps changed",
        Reason::StableChanged => "another stable version",
        Reason::VersionLeft => "a version left",
        Reason::DocumentLeft => "the document left",
        Reason::DocumentReturned => "the document is back",
        Reason::Undecided => "undecided",
        Reason::BothFailing => "both fail",
        Reason::PauseStep => "pause",
        Reason::PausedByUser => "paused",
        Reason::Resumed => "resumed",
        Reason::Promoted => "promoted",
        Reason::WeightSet => "set by hand",
        Reason::Completed => "succeeded",
        Reason::VerdictFail => "failed: verdict",
        Reason::GuardVeto => "guards keep it out",
        Reason::NoProxies => "no proxy",
        Reason::ProxiesBehind => "proxies behind",
        Reason::NotRouted => "not routed",
        Reason::NoGoodAnswer => "no good answer",
        Reason::TooManyErrors => "failed: errors",
        Reason::Aborted => "aborted",
        Reason::RolledBack => "rolled back",
    })
}
