//! Labels at vertical lines: each in a row above the panels, so that no text covers another and no line crosses one.

use super::canvas::width_of;

/// The size of labels' font.
pub(super) const SIZE: f64 = 12.0;
/// The most rows; what finds no place in them has a line and no label.
const MOST_ROWS: usize = 6;
/// Between a line and its text, and from a text to whatever is next.
pub(super) const GAP: f64 = 4.0;

/// A text at a line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Label {
    /// Where the line is.
    pub(super) x: f64,
    pub(super) text: String,
    /// The higher, the later it is left out.
    pub(super) weight: u8,
    /// Counted from the panels up; none: left out.
    pub(super) row: Option<usize>,
    /// Whether the text is on the left of the line.
    pub(super) left: bool,
}

impl Label {
    /// One that has no place yet.
    pub(super) fn new(x: f64, text: String, weight: u8) -> Self {
        Self { x, text, weight, row: None, left: false }
    }

    /// From where to where the text goes.
    fn span(&self) -> (f64, f64) {
        let width = width_of(&self.text, SIZE) + 2.0 * GAP;
        if self.left { (self.x - width, self.x) } else { (self.x, self.x + width) }
    }

    /// Whether the two cannot both be where they are.
    fn collides(&self, other: &Self) -> bool {
        let ((from, to), (other_from, other_to)) = (self.span(), other.span());
        let crosses = |line: &Self, text: &Self| {
            let (from, to) = text.span();
            line.row > text.row && line.x > from - 1.0 && line.x < to
        };
        (self.row == other.row && from < other_to && other_from < to) || crosses(self, other) || crosses(other, self)
    }
}

/// Gives every label a row, as far as there are any, and returns how many there are. No text goes beyond `right`.
pub(super) fn place(labels: &mut [Label], right: f64) -> usize {
    for label in labels.iter_mut() {
        label.left = label.span().1 > right;
    }
    // From the right to the left, the heaviest get their places first if not all fit.
    let mut order: Vec<usize> = (0..labels.len()).collect();
    order.sort_by(|a, b| labels[*b].x.total_cmp(&labels[*a].x).then(b.cmp(a)));
    let mut wanted: Vec<u8> = labels.iter().map(|label| label.weight).collect();
    wanted.sort_unstable();
    wanted.dedup();
    for least in wanted {
        labels.iter_mut().for_each(|label| label.row = None);
        let mut all = true;
        for i in order.iter().copied().filter(|i| labels[*i].weight >= least).collect::<Vec<_>>() {
            let fits = |row: &usize| {
                let label = Label { row: Some(*row), ..labels[i].clone() };
                !labels.iter().any(|other| other.row.is_some() && other.collides(&label))
            };
            labels[i].row = (0..MOST_ROWS).find(fits);
            all &= labels[i].row.is_some();
        }
        if all {
            break;
        }
    }
    labels.iter().filter_map(|label| label.row).max().map_or(0, |row| row + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_label_is_in_the_way_of_another(
            given in prop::collection::vec((0.0..800.0, 1usize..20, 0u8..4), 0..40)
        ) {
            let label = |(x, long, weight): &(f64, usize, u8)| Label::new(*x, "e".repeat(*long), *weight);
            let mut labels: Vec<Label> = given.iter().map(label).collect();
            let rows = place(&mut labels, 900.0);
            prop_assert!(rows <= MOST_ROWS);
            let placed: Vec<&Label> = labels.iter().filter(|label| label.row.is_some()).collect();
            for (i, label) in placed.iter().enumerate() {
                prop_assert!(label.span().1 <= 900.0);
                for other in &placed[..i] {
                    prop_assert!(!label.collides(other), "{label:?} {other:?}");
                }
            }
            prop_assert_eq!(placed.is_empty(), labels.is_empty());
        }
    }

    #[test]
    fn labels_close_together_go_up_like_stairs() {
        let mut labels = vec![Label::new(100.0, "start".to_owned(), 1), Label::new(110.0, "25 %".to_owned(), 1)];
        assert_eq!(place(&mut labels, 900.0), 2);
        assert_eq!([labels[0].row, labels[1].row], [Some(1), Some(0)]);
    }
}
