//! Reports of a comparison that nobody made, whose figures are known.

use super::figures::digits;
use super::*;
use crate::comparison::{Environment, FORMAT, Outcome, Sample, Settings, Side, SideInfo};
use crate::job::{Job, Pattern, default_jobs};

/// A round of one second with these requests, CPU seconds and median latency; the 99 % are four times as long.
fn sample(operations: u64, cpu_seconds: f64, p50_us: f64) -> Sample {
    Sample {
        seconds: 1.0,
        operations,
        iops: operations as f64,
        mib_per_s: operations as f64,
        mean_us: p50_us,
        p50_us,
        p99_us: 4.0 * p50_us,
        p999_us: 8.0 * p50_us,
        cpu_seconds,
        ..Sample::default()
    }
}

fn measured(operations: u64, cpu_seconds: f64, p50_us: f64) -> Outcome {
    Outcome::Measured(sample(operations, cpu_seconds, p50_us))
}

fn failed(why: &str) -> Outcome {
    Outcome::Failed(why.into())
}

fn nothing() -> Comparison {
    let info = |side, program: &str| SideInfo { side, program: program.into(), storage: "memory".into() };
    Comparison {
        format: FORMAT,
        way: Way::Frontend,
        date: "2026-01-31 12:00".into(),
        environment: Environment {
            accelerator: Accelerator::NoGuest,
            sides: vec![info(Side::VhostBlk, "vhost-blk 1.0"), info(Side::DataPlane, "qemu <9>")],
            cpu: "A CPU".into(),
            cpus: 2,
            kernel: "Linux 6".into(),
            placement: "everybody everywhere".into(),
        },
        settings: Settings { repeat: 3, seconds: 1.0, queues: 1, disk_bytes: 1 << 28 },
        notes: vec!["Read \"this\" & think.".into()],
        rows: Vec::new(),
    }
}

/// `rounds` of the first default job on each side.
fn comparison(ours: &[Outcome], base: &[Outcome]) -> Comparison {
    let job = &default_jobs(1)[0];
    let mut comparison = nothing();
    for (side, rounds) in [(Side::VhostBlk, ours), (Side::DataPlane, base)] {
        rounds.iter().for_each(|round| comparison.add(job, side, round.clone()));
    }
    comparison
}

/// The cells of the table's line for `side`, the side's name first.
fn cells(text: &str, side: &str) -> Vec<String> {
    let line =
        text.lines().filter(|line| line.starts_with(&format!("  {side}"))).nth(1).unwrap_or_else(|| panic!("{text}"));
    line.trim().split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
}

/// The lengths of the bars of `class` in the page, in the order of the page, normalised by that of the scale.
fn bars(page: &str, class: &str) -> Vec<f64> {
    let one: Vec<f64> = numbers(page, "<line class=\"one\" x1=\"", '"');
    let start: Vec<f64> = numbers(page, "<line class=\"grid\" x1=\"", '"');
    let lengths = numbers(page, &format!("<rect class=\"{class}\" x=\"{}\" y=\"", start[0]), '/');
    // All panels of these tests have the same scale, or there is only one.
    lengths.into_iter().map(|length| length / (one[0] - start[0])).collect()
}

/// The numbers that follow `before` in `text`; of a rectangle, its width.
fn numbers(text: &str, before: &str, end: char) -> Vec<f64> {
    let after = text.split(before).skip(1);
    let number = |text: &str| match end {
        '"' => text.split('"').next().unwrap().parse().unwrap(),
        _ => text.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap(),
    };
    after.map(number).collect()
}

#[test]
fn the_table_has_medians_spreads_and_ratios() {
    let ours = [measured(300_000, 1.0, 10.0), measured(100_000, 0.5, 30.0), measured(200_000, 0.8, 20.0)];
    let base = [measured(50_000, 0.5, 100.0), measured(60_000, 0.5, 100.0), measured(40_000, 0.5, 100.0)];
    let text = table(&comparison(&ours, &base));
    assert!(
        text.starts_with("vhost-blk beside virtio-blk-data-plane: a front-end without a guest, 2026-01-31 12:00 UTC\n")
    );
    // Per core: 300 k, 200 k, 250 k; base 100 k, 120 k, 80 k.
    let expected = ["vhost-blk", "200 k (100 k–300 k)", "4.00×", "250 k", "2.50×", "0.80", "20.0", "80.0", "160"];
    assert_eq!(cells(&text, "vhost-blk"), expected);
    let expected = ["data-plane", "50.0 k (40.0 k–60.0 k)", "1.00×", "100 k", "1.00×", "0.50", "100", "400", "800"];
    assert_eq!(cells(&text, "data-plane"), expected);
    assert!(text.contains("\n- Read \"this\" & think.\n"), "{text}");
}

#[test]
fn a_drive_in_software_is_charged_in_brackets() {
    let mut ours = sample(100_000, 0.5, 10.0);
    ours.drive_cpu_seconds = Some(1.5);
    let comparison = comparison(&[Outcome::Measured(ours)], &[measured(50_000, 0.5, 10.0)]);
    let cells = cells(&table(&comparison), "vhost-blk");
    assert_eq!(cells[3..6], ["200 k (50.0 k)", "2.00× (0.50×)", "0.50 + 1.50"]);
    let page = html(&comparison);
    // The pale bar is as long as without the drive, the solid one as with it.
    let panel = page.split("<section>").nth(2).unwrap();
    assert_eq!(bars(panel, "ours pale").iter().map(|bar| digits(*bar)).collect::<Vec<_>>(), ["2.00"]);
    assert_eq!(bars(panel, "ours").iter().map(|bar| digits(*bar)).collect::<Vec<_>>(), ["0.50"]);
}

#[test]
fn bars_are_normalised_to_data_plane() {
    let comparison = comparison(&[measured(120_000, 1.0, 10.0)], &[measured(40_000, 1.0, 10.0)]);
    let page = html(&comparison);
    let panel = page.split("<section>").nth(1).unwrap();
    let rounded = |class| bars(panel, class).iter().map(|bar| digits(*bar)).collect::<Vec<_>>();
    assert_eq!((rounded("ours"), rounded("base")), (vec!["3.00".to_owned()], vec!["1.00".to_owned()]));
    assert!(panel.contains("3.00×  120 k IOPS") && panel.contains("1.00×  40.0 k IOPS"), "{panel}");
}

#[test]
fn a_bound_that_does_no_work_does_not_set_the_scale() {
    let mut comparison = comparison(&[measured(80_000, 1.0, 10.0)], &[measured(40_000, 1.0, 10.0)]);
    let job = comparison.rows[0].job.clone();
    comparison.add(&job, Side::DataPlaneNull, measured(40_000_000, 1.0, 1.0));
    let page = html(&comparison);
    let panel = page.split("<section>").nth(1).unwrap();
    assert_eq!(bars(panel, "null").len(), 1);
    assert!(bars(panel, "null")[0] < 3.0, "cut at the end of the scale");
    assert!(panel.contains("class=\"cut\"") && panel.contains("1000×"), "{panel}");
}

#[test]
fn the_page_needs_nothing_but_itself() {
    let comparison = comparison(&[measured(1000, 1.0, 10.0)], &[failed("<script>alert(1)</script> & \"more\"")]);
    let page = html(&comparison);
    for outside in ["http:", "https:", "url(", "@import", "src=", "href=", "<script", "<link", "<img", "<iframe"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("failed: &lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;more&quot;"), "{page}");
    assert!(page.contains("qemu &lt;9&gt;"));
    assert!(page.contains("prefers-color-scheme: dark"));
    for (open, close) in
        [("<svg", "</svg>"), ("<section", "</section>"), ("<g>", "</g>"), ("<ul", "</ul>"), ("<td", "</td>")]
    {
        assert_eq!(page.matches(open).count(), page.matches(close).count(), "{open}");
    }
}

#[test]
fn json_is_read_back_as_it_was() {
    let mut comparison =
        comparison(&[measured(1000, 0.1, 12.34), failed("gone \"away\"\n")], &[measured(7, 0.0, 0.001)]);
    let rate = Job::new(Pattern::RandomRead, 4096, 128, Some(10_000), 3);
    let odd = Sample { unsent: Some(5), hop_ns: Some(61.5), empty_polls: Some(0.25), ..sample(3, 0.25, 1.0 / 3.0) };
    comparison.add(&rate, Side::DataPlaneNull, Outcome::Measured(odd));
    let text = json(&comparison);
    let back: Comparison = serde_json::from_str(&text).unwrap();
    assert_eq!(back, comparison);
    // What other programs read.
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["format"], 1);
    assert_eq!(value["rows"][0]["job"]["name"], "randwrite-4k-q32");
    assert_eq!(value["rows"][0]["results"][0]["side"], "vhost-blk");
    assert_eq!(value["rows"][0]["results"][0]["rounds"][0]["measured"]["iops"], 1000.0);
    assert_eq!(value["rows"][0]["results"][0]["rounds"][1]["failed"], "gone \"away\"\n");
}

#[test]
fn a_failed_job_is_not_a_zero() {
    let comparison = comparison(&[failed("the disk is gone"), failed("the same again")], &[measured(1000, 1.0, 10.0)]);
    assert!(!comparison.is_success());
    let text = table(&comparison);
    assert!(text.contains("  vhost-blk  failed: the disk is gone\n"), "{text}");
    assert!(text.contains("2 of 2 rounds failed: the disk is gone"), "{text}");
    let page = html(&comparison);
    assert!(page.contains("vhost-blk: failed</text>") && page.contains("failed: the disk is gone</td>"), "{page}");
    assert!(!page.contains("<rect class=\"ours\""));
}

#[test]
fn rounds_that_failed_are_told_beside_those_that_did_not() {
    let comparison = comparison(&[failed("lost"), measured(3000, 1.0, 1.0)], &[measured(1000, 1.0, 1.0)]);
    let text = table(&comparison);
    assert_eq!(cells(&text, "vhost-blk")[1..3], ["3.00 k", "3.00×"]);
    assert!(text.contains("1 of 2 rounds failed: lost"), "{text}");
    assert!(html(&comparison).contains("3.00×  3.00 k IOPS, 1 of 2 rounds failed"));
}

#[test]
fn without_data_plane_nothing_is_normalised() {
    for base in [&[][..], &[failed("no")], &[measured(0, 0.0, 0.0)]] {
        let comparison = comparison(&[measured(3000, 1.0, 1.0)], base);
        assert_eq!(cells(&table(&comparison), "vhost-blk")[1..5], ["3.00 k", "–", "3.00 k", "–"]);
        let page = html(&comparison);
        assert!(page.contains("vhost-blk: 3.00 k IOPS; data-plane was not measured"), "{page}");
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}

#[test]
fn zeroes_are_no_numbers_to_divide_by() {
    let comparison = comparison(&[measured(0, 0.0, 0.0)], &[measured(1000, 0.001, 1.0)]);
    let text = table(&comparison);
    // Too little CPU time to be known is not an infinite rate.
    assert_eq!(cells(&text, "vhost-blk")[1..6], ["0.00", "0.00×", "–", "–", "0.00"]);
    assert_eq!(cells(&text, "data-plane")[3..5], ["–", "–"]);
    let page = html(&comparison);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    assert!(page.contains("too little CPU time to be known"));
}

#[test]
fn nothing_at_all_is_still_a_report() {
    let comparison = nothing();
    assert!(!comparison.is_success());
    assert!(table(&comparison).contains("IOPS (min–max)"));
    assert!(!html(&comparison).contains("<svg"));
    assert_eq!(serde_json::from_str::<Comparison>(&json(&comparison)).unwrap(), comparison);
}

#[test]
fn what_the_rounds_say_against_themselves_is_told() {
    let mut comparison = nothing();
    let rate = Job::new(Pattern::RandomRead, 4096, 128, Some(10_000), 1);
    comparison.add(
        &rate,
        Side::VhostBlk,
        Outcome::Measured(Sample { empty_polls: Some(0.01), ..sample(10_000, 1.0, 1.0) }),
    );
    comparison.add(&rate, Side::DataPlane, Outcome::Measured(Sample { errors: 3, ..sample(9_000, 1.0, 1.0) }));
    comparison.rows[0].results[0]
        .rounds
        .push(Outcome::Measured(Sample { hop_ns: Some(400.0), ..sample(9_999, 1.0, 1.0) }));
    comparison.rows[0].results[1]
        .rounds
        .push(Outcome::Measured(Sample { hop_ns: Some(60.0), ..sample(10_000, 1.0, 1.0) }));
    let text = table(&comparison).replace("\n  ", " ");
    assert!(
        text.contains("data-plane, 4 KiB random read, 10000 per second: the rate was not kept: 9000 to 10000 of 10000"),
        "{text}"
    );
    assert!(!text.contains("vhost-blk, 4 KiB random read, 10000 per second: the rate was not kept"), "{text}");
    assert!(
        text.contains("vhost-blk, 4 KiB random read, 10000 per second: the load generator was the limit"),
        "{text}"
    );
    assert!(text.contains("data-plane, 4 KiB random read, 10000 per second: 3 requests failed"), "{text}");
    assert!(text.contains("(median; 60.0 to 400). It changed by more than a factor of 2"), "{text}");
}

#[test]
fn emulated_figures_say_that_they_are() {
    let mut comparison = comparison(&[measured(1, 1.0, 1.0)], &[measured(1, 1.0, 1.0)]);
    comparison.way = Way::Guest;
    comparison.environment.accelerator = Accelerator::Emulation;
    for text in [table(&comparison), html(&comparison)] {
        assert!(text.contains("emulated guest (functional figures, not performance)"), "{text}");
    }
}

#[test]
fn reports_of_one_side_each_can_be_joined() {
    let (ours, base) = (comparison(&[measured(3000, 1.0, 1.0)], &[]), comparison(&[], &[measured(1000, 1.0, 1.0)]));
    let joined = base.clone().join(ours.clone()).unwrap();
    assert_eq!(cells(&table(&joined), "vhost-blk")[1..3], ["3.00 k", "3.00×"]);
    assert_eq!((joined.rows.len(), joined.environment.sides.len(), joined.notes.len()), (1, 2, 1));
    assert!(ours.clone().join(ours.clone()).unwrap_err().contains("both have randwrite-4k-q32 on vhost-blk"));
    let mut other = base.clone();
    other.environment.kernel = "Linux 7".into();
    assert!(ours.clone().join(other).unwrap_err().contains("different machines or kernels"));
    let mut other = base.clone();
    other.settings.seconds = 2.0;
    assert!(ours.clone().join(other).unwrap_err().contains("not the same"));
    let mut other = base;
    other.way = Way::Guest;
    assert!(ours.join(other).unwrap_err().contains("same way"));
}
