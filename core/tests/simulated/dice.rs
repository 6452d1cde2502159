//! Random numbers, and what is made of them.

#![allow(dead_code)] // Each test program uses a part of it.

/// SplitMix64.
pub(crate) struct Dice(u64);

impl Dice {
    /// The same seed gives the same numbers.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xD6E8_FEB8_6659_FD93))
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// One of so many.
    pub(crate) fn below(&mut self, all: u32) -> u32 {
        (((self.roll() >> 32) * u64::from(all)) >> 32) as u32
    }

    /// 0 to 1, not 0.
    pub(crate) fn unit(&mut self) -> f64 {
        unit(self.roll())
    }

    /// Whether something with this probability happens.
    pub(crate) fn happens(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.unit() <= probability
    }

    /// Exponentially distributed.
    pub(crate) fn wait(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }

    /// Normally distributed.
    pub(crate) fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// How many of so many happen, each with this probability.
    pub(crate) fn of(&mut self, all: u64, probability: f64) -> u64 {
        match probability {
            ..=0.0 => 0,
            1.0.. => all,
            _ if probability > 0.5 => all - self.of(all, 1.0 - probability),
            _ => {
                let (mut at, mut happen) = (0.0, 0);
                loop {
                    at += (self.unit().ln() / (1.0 - probability).ln()).floor() + 1.0;
                    if at > all as f64 {
                        return happen;
                    }
                    happen += 1;
                }
            }
        }
    }

    /// How many events there are where so many are to be expected.
    pub(crate) fn events(&mut self, mean: f64) -> u64 {
        if mean > 40.0 {
            return (mean + self.normal() * mean.sqrt()).round().max(0.0) as u64;
        }
        let (mut events, mut product, least) = (0, self.unit(), (-mean).exp());
        while product > least {
            events += 1;
            product *= self.unit();
        }
        events
    }
}

/// A hash of a number.
pub(crate) fn mix(number: u64) -> u64 {
    let z = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// 0 to 1, not 0.
pub(crate) fn unit(number: u64) -> f64 {
    ((number >> 11) + 1) as f64 / (1u64 << 53) as f64
}
