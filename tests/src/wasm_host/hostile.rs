//! A misbehaving host: replaces host calls or corrupts their results.

use super::shared::Random;

/// A fault of a host call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does nothing and returns this status, which the ABI need not define; 0 claims success.
    Status(u32),
    /// It returns these bytes instead of the real ones.
    Bytes(Vec<u8>),
    /// It returns the real bytes with some changed, truncated or added, as the seed determines.
    Spoilt(u64),
    /// It returns the real bytes, but with these values for their address and size.
    Handed {
        /// The returned address.
        address: Word,
        /// The returned size.
        size: Word,
    },
    /// It returns this instead of the real number: a time, the value of a metric, an id, a token, a version.
    Number(u64),
    /// It first requests this much memory from the module, and does not use it.
    Allocate(u32),
    /// It first calls this export of the module, with these arguments.
    CallBack(&'static str, Vec<u32>),
}

/// A fault of a number that is written to the module's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The real value.
    Right,
    /// It is not written at all.
    Unwritten,
    /// This value.
    Is(u32),
    /// The real value plus this.
    Plus(u32),
}

impl Word {
    pub(super) fn of(self, right: u32) -> Option<u32> {
        match self {
            Self::Right => Some(right),
            Self::Unwritten => None,
            Self::Is(other) => Some(other),
            Self::Plus(more) => Some(right.wrapping_add(more)),
        }
    }
}

impl Fault {
    /// Statuses: all that Envoy uses, and some undefined ones.
    pub fn statuses() -> impl Iterator<Item = Self> {
        [0, 1, 2, 3, 4, 6, 7, 8, 10, 12, 13, 77, 256, u32::MAX].into_iter().map(Self::Status)
    }

    /// Results at an invalid address or with an invalid length.
    pub fn places() -> impl Iterator<Item = Self> {
        use Word::{Is, Plus, Right, Unwritten};
        let both = |address, size| Self::Handed { address, size };
        let addresses = [Unwritten, Is(0), Is(1), Is(1024), Plus(1), Plus(u32::MAX), Is(0x7fff_ffff), Is(u32::MAX)];
        let sizes = [Unwritten, Is(0), Is(1), Plus(1), Plus(u32::MAX), Is(0x7fff_ffff), Is(u32::MAX)];
        let wrong_address = addresses.into_iter().map(move |address| both(address, Right));
        let wrong_size = sizes.into_iter().map(move |size| both(Right, size));
        let both_wrong = [(Is(0), Is(u32::MAX)), (Is(u32::MAX), Is(u32::MAX)), (Is(u32::MAX), Is(1)), (Is(8), Is(8))];
        wrong_address.chain(wrong_size).chain(both_wrong.into_iter().map(move |(address, size)| both(address, size)))
    }

    /// Results of odd sizes, and header maps with wrong counts and lengths.
    pub fn contents() -> impl Iterator<Item = Self> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        let lying_maps = [
            words(&[0]),
            words(&[1]),
            words(&[u32::MAX]),
            words(&[0x2000_0000, 1, 1]), // times 8 is 0 in 32 bits
            words(&[1, u32::MAX, u32::MAX]),
            words(&[1, 4, u32::MAX, 0]),
            words(&[1, 0, 0]),
            words(&[2, 0, 0, 0, 0, 0]),
            words(&[3, 1, 1, 1]),
        ];
        let odd_sizes = (0..10).chain([15, 16, 17, 24, 4_095]).map(|size| vec![0xff; size]);
        let zeros = [1, 4, 8, 16, 4_096].map(|size| vec![0; size]);
        lying_maps.into_iter().chain(odd_sizes).chain(zeros).map(Self::Bytes).chain((0..8).map(Self::Spoilt))
    }

    /// Results that are much too large, one of them too large to be accepted at all.
    pub fn floods() -> impl Iterator<Item = Self> {
        [200_000, (64 << 20) + 1].into_iter().map(|size| Self::Bytes(vec![b'7'; size]))
    }

    /// Numbers over the whole range.
    pub fn numbers() -> impl Iterator<Item = Self> {
        let ends = [0, 1, 2, 3, 1 << 31, u64::from(u32::MAX), 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];
        ends.into_iter().map(Self::Number)
    }

    /// Requests for memory, few of which can be granted.
    pub fn allocations() -> impl Iterator<Item = Self> {
        [0, 1, 7, 65_537, (64 << 20) + 1, 512 << 20, 1 << 31, u32::MAX - 7, u32::MAX].into_iter().map(Self::Allocate)
    }

    /// Calls into the module, which Envoy never makes during a host call.
    pub fn call_backs() -> impl Iterator<Item = Self> {
        [
            ("proxy_on_tick", vec![1]),
            ("proxy_on_log", vec![2]),
            ("proxy_on_done", vec![1]),
            ("proxy_on_context_create", vec![1, 0]),
            ("proxy_on_request_headers", vec![2, 3, 1]),
            ("proxy_on_configure", vec![1, 10]),
            ("proxy_on_queue_ready", vec![1, 1]),
            ("proxy_on_http_call_response", vec![1, 4, 1, 1, 0]),
        ]
        .into_iter()
        .map(|(name, arguments)| Self::CallBack(name, arguments))
    }

    /// Any of these.
    pub(super) fn any(random: &mut Random) -> Self {
        match random.below(8) {
            0..3 => Self::Status(random.odd_number() as u32),
            3 => random.one_of(Self::places()),
            4 => random.one_of(Self::contents()),
            5 => Self::Spoilt(random.next()),
            6 => Self::Number(random.odd_number()),
            _ => random.one_of(Self::allocations().chain(Self::call_backs())),
        }
    }
}

/// Bytes with some changed, truncated or added.
pub(super) fn spoil(mut bytes: Vec<u8>, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        match random.below(5) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            2 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
            3 => {
                let word = (random.odd_number() as u32).to_le_bytes();
                bytes.iter_mut().skip(at & !3).zip(word).for_each(|(byte, new)| *byte = new);
            }
            _ => bytes.extend_from_within(at..),
        }
    }
    bytes
}
