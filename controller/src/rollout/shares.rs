//! Computes each version's share from the wanted shares and the capacities. Pure arithmetic:
//! [`rollout`](crate::rollout) provides the wanted shares, readiness the capacities.

use std::collections::BTreeSet;

/// The sum of the weights if whole percents are not exact: thousandths of a percent.
const FINE_TOTAL: u32 = 100_000;

/// One version's claim to a share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Claim {
    /// The share that it should have, 0 to 1.
    pub wanted: f64,
    /// The share of the whole load that its ready endpoints can carry; 0 if it has none.
    pub capacity: f64,
    /// Versions with a higher number get traffic only if no version with a lower number has a ready endpoint.
    pub reserve: u8,
    /// Load that other versions cannot carry goes first to versions with a low number.
    pub turn: u8,
}

/// Each version's share of the traffic, 0 to 1, summing to 1 unless nothing is ready.
///
/// While the versions together can carry the load, no version gets more than its capacity: each gets its wanted share
/// up to its capacity, and the rest goes to versions with spare capacity, in their order. If the versions together
/// cannot carry the load, it is divided by capacity; no traffic is dropped here.
pub fn shares(claims: &[Claim]) -> Vec<f64> {
    let in_use = claims.iter().filter(|claim| claim.capacity > 0.0).map(|claim| claim.reserve).min();
    let claims: Vec<Claim> = claims
        .iter()
        .map(|claim| match Some(claim.reserve) == in_use {
            true => *claim,
            false => Claim { wanted: 0.0, capacity: 0.0, ..*claim },
        })
        .collect();
    let capacity: f64 = claims.iter().map(|claim| claim.capacity).sum();
    if capacity <= 1.0 {
        let part = |claim: &Claim| if capacity > 0.0 { claim.capacity / capacity } else { 0.0 };
        return claims.iter().map(part).collect();
    }
    let wanted = claims.iter().map(|claim| claim.wanted).sum::<f64>().max(1.0);
    let mut shares: Vec<f64> = claims.iter().map(|claim| (claim.wanted / wanted).min(claim.capacity)).collect();
    let turns: BTreeSet<u8> = claims.iter().map(|claim| claim.turn).collect();
    for turn in turns {
        fill(&mut shares, &claims, turn);
    }
    shares
}

/// Distributes the remaining share among the versions with this `turn`, in proportion to their spare capacity.
fn fill(shares: &mut [f64], claims: &[Claim], turn: u8) {
    let room = |share: f64, claim: &Claim| if claim.turn == turn { (claim.capacity - share).max(0.0) } else { 0.0 };
    let left = 1.0 - shares.iter().sum::<f64>();
    let sum: f64 = shares.iter().zip(claims).map(|(share, claim)| room(*share, claim)).sum();
    if left <= 0.0 || sum <= 0.0 {
        return;
    }
    for (share, claim) in shares.iter_mut().zip(claims) {
        *share += room(*share, claim) * (left / sum).min(1.0);
    }
}

/// Converts shares to weights: percents if whole percents are exact, else thousandths of a percent. A share above 0
/// never becomes a weight of 0, and the weights sum to 100 or 100,000 as far as that allows.
pub fn weights(shares: &[f64]) -> Vec<u32> {
    let percents = shares.iter().all(|share| (share * 100.0 - (share * 100.0).round()).abs() < 1e-9);
    let total = if percents { 100 } else { FINE_TOTAL };
    let exact: Vec<f64> = shares.iter().map(|share| share * f64::from(total)).collect();
    let mut weights: Vec<u32> = exact.iter().map(|x| if *x > 1e-9 { (x.floor() as u32).max(1) } else { 0 }).collect();
    // Largest remainder: what is left over from rounding down goes to the shares that lost most.
    let mut order: Vec<usize> = (0..shares.len()).filter(|i| exact[*i] > 1e-9).collect();
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
    let sum: u32 = weights.iter().sum();
    for i in order.into_iter().cycle().take(total.saturating_sub(sum) as usize) {
        weights[i] += 1;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(wanted: f64, capacity: f64) -> Claim {
        Claim { wanted, capacity, reserve: 0, turn: 0 }
    }

    fn close(a: &[f64], b: &[f64]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9)
    }

    #[test]
    fn what_is_wanted_is_given_where_it_can_be_carried() {
        assert!(close(&shares(&[claim(0.75, 1.0), claim(0.25, 1.0)]), &[0.75, 0.25]));
    }

    #[test]
    fn forward_only_as_far_as_the_new_version_can_carry() {
        assert!(close(&shares(&[claim(0.0, 1.0), claim(1.0, 0.25)]), &[0.75, 0.25]));
    }

    #[test]
    fn back_only_as_far_as_the_old_version_can_carry() {
        assert!(close(&shares(&[claim(1.0, 0.5), claim(0.0, 1.0)]), &[0.5, 0.5]));
    }

    #[test]
    fn too_little_for_all_is_shared_by_capacity() {
        assert!(close(&shares(&[claim(1.0, 0.2), claim(0.0, 0.1)]), &[2.0 / 3.0, 1.0 / 3.0]));
        assert!(close(&shares(&[claim(1.0, 0.0), claim(0.0, 0.1)]), &[0.0, 1.0]));
    }

    #[test]
    fn a_reserve_serves_only_when_nobody_else_can() {
        let reserve = Claim { wanted: 0.0, capacity: 1.0, reserve: 1, turn: 0 };
        assert!(close(&shares(&[claim(1.0, 0.1), reserve]), &[1.0, 0.0]));
        assert!(close(&shares(&[claim(1.0, 0.0), reserve]), &[0.0, 1.0]));
        assert!(close(&shares(&[claim(1.0, 0.0), claim(0.0, 0.0)]), &[0.0, 0.0]));
    }

    #[test]
    fn what_one_cannot_carry_goes_to_the_others_in_their_turn() {
        let claim = |wanted, capacity, turn| Claim { turn, ..claim(wanted, capacity) };
        // v1 is to have 99 % and has a quarter of its endpoints, v2 was superseded, v3 is at 1 %.
        assert!(close(&shares(&[claim(0.99, 0.25, 0), claim(0.0, 1.0, 1), claim(0.01, 1.0, 2)]), &[0.25, 0.74, 0.01]));
        assert!(close(&shares(&[claim(0.99, 0.25, 0), claim(0.0, 0.5, 1), claim(0.01, 1.0, 2)]), &[0.25, 0.5, 0.25]));
        assert!(close(&shares(&[claim(1.0, 0.25, 0), claim(0.0, 1.0, 1), claim(0.0, 1.0, 2)]), &[0.25, 0.75, 0.0]));
    }

    #[test]
    fn weights_are_percents_where_they_can_be() {
        assert_eq!(weights(&[0.75, 0.25]), [75, 25]);
        assert_eq!(weights(&[0.99, 0.01, 0.0]), [99, 1, 0]);
        assert_eq!(weights(&[2.0 / 3.0, 1.0 / 3.0]), [66_667, 33_333]);
        assert_eq!(weights(&[0.0, 0.0]), [0, 0]);
        assert_eq!(weights(&[1.0 - 1e-8, 1e-8])[1], 1);
    }

    proptest! {
        #[test]
        fn nobody_carries_too_much_and_nothing_is_dropped(
            claims in prop::collection::vec((0.0..1.0, 0u32..8, 1u32..8, 0u8..3, 0u8..3), 1..6)
        ) {
            let claims: Vec<Claim> = claims
                .into_iter()
                .map(|(wanted, ready, of, reserve, turn)| {
                    Claim { wanted, capacity: f64::from(ready) / f64::from(of), reserve, turn }
                })
                .collect();
            let shares = shares(&claims);
            let first = claims.iter().filter(|c| c.capacity > 0.0).map(|c| c.reserve).min();
            let in_use = |c: &Claim| Some(c.reserve) == first;
            let capacity: f64 = claims.iter().filter(|c| in_use(c)).map(|c| c.capacity).sum();
            let sum: f64 = shares.iter().sum();
            prop_assert!((sum - if capacity > 0.0 { 1.0 } else { 0.0 }).abs() < 1e-6, "{:?}", shares);
            for (share, claim) in shares.iter().zip(&claims) {
                prop_assert!(*share >= 0.0);
                prop_assert!(*share == 0.0 || (claim.capacity > 0.0 && in_use(claim)));
                prop_assert!(capacity < 1.0 || *share <= claim.capacity + 1e-6, "{:?} {:?}", shares, claims);
            }
            // No version gets less than it wants while it has spare capacity, and none gets more than it wants while a
            // version before it in the order has spare capacity.
            let wanted: f64 = claims.iter().filter(|c| in_use(c)).map(|c| c.wanted).sum();
            for (share, claim) in shares.iter().zip(&claims).filter(|(_, c)| in_use(c) && capacity > 1.0) {
                let should = claim.wanted / wanted.max(1.0);
                prop_assert!(*share >= should.min(claim.capacity) - 1e-6, "{:?} {:?}", shares, claims);
                for (other, earlier) in shares.iter().zip(&claims).filter(|(_, c)| in_use(c) && c.turn < claim.turn) {
                    let is_full = *other >= earlier.capacity - 1e-6;
                    prop_assert!(*share <= should + 1e-6 || is_full, "{:?} {:?}", shares, claims);
                }
            }
            let weights = weights(&shares);
            for (weight, share) in weights.iter().zip(&shares) {
                prop_assert_eq!(*weight > 0, *share > 1e-9);
            }
        }
    }
}
