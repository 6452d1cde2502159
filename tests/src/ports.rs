//! Loopback ports that are reserved while a test needs them, even while nothing listens on them.
//!
//! The kernel may reassign a port from `bind(0)` as soon as it is closed, and it lies in the range of source ports for
//! outgoing connections: a client that calls a stopped backend there can even connect to itself. Therefore these ports
//! are below that range, and a UDP socket bound to the same number is the lock that other test processes see. The lock
//! ends with the process, however that ends.

use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::bail;

const RANGE: Range<u16> = 20_000..32_000;

/// A TCP port of 127.0.0.1 that is ours for as long as this value lives.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: UdpSocket,
}

impl Port {
    /// Reserves a port without a listener.
    pub fn reserve() -> anyhow::Result<Self> {
        static TRIED: AtomicU16 = AtomicU16::new(0);
        let length = RANGE.end - RANGE.start;
        let home = (process::id().wrapping_mul(997) % u32::from(length)) as u16;
        for _ in RANGE {
            let step = TRIED.fetch_add(1, Ordering::Relaxed) % length;
            let number = RANGE.start + (home + step) % length;
            if let Ok(lock) = UdpSocket::bind((Ipv4Addr::LOCALHOST, number))
                // Asked by calling, not by listening: a listener could live on for a moment in a process that another
                // thread is about to start.
                && TcpStream::connect((Ipv4Addr::LOCALHOST, number)).is_err()
            {
                return Ok(Self { number, _lock: lock });
            }
        }
        bail!("no free loopback port in {RANGE:?}")
    }

    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The address to listen on or to connect to.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn ports_are_distinct_and_can_be_listened_on() {
        let ports: Vec<_> = (0..50).map(|_| Port::reserve().unwrap()).collect();
        let mut numbers: Vec<_> = ports.iter().map(Port::number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), ports.len());
        let listeners: Vec<_> = ports.iter().map(|port| TcpListener::bind(port.address()).unwrap()).collect();
        assert_eq!(listeners.len(), ports.len());
    }
}
