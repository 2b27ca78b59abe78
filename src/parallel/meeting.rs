//! Where processes meet that no launcher has connected: each has a socket to rank 0.
//!
//! Each call is a roll call, as with MPI: every rank reports to rank 0, and rank 0 answers all with what they brought, or with who is missing.
//! This is for messages of some hundred bytes; tensors go by the engine that the processes meet for.

use super::bytes::pieces;
use super::communicator::{Communicator, TIME_LIMIT, add, until};
use candle_core::{Error, Result, bail};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a process says first, so that nobody else is taken for one.
const GREETING: &[u8] = b"kronwake 1";
/// Before what a rank brings, and what all have brought.
const ALL: u8 = 0;
/// Before the sentence of why there is nothing.
const WHY: u8 = 1;
/// All that a rank says that has come to its end.
const LEFT: u8 = 2;
/// How long something may take yet that a rank was part of before it left; at most half of the time limit.
const GRACE: Duration = Duration::from_secs(30);

/// This process among those that have met.
#[derive(Debug)]
pub(super) struct Meeting {
    rank: usize,
    size: usize,
    limit: Mutex<Duration>,
    links: Mutex<Links>,
}

#[derive(Debug)]
struct Links {
    /// Of rank 0 those to the others, by rank; of the others that to rank 0.
    of: Vec<Option<Link>>,
    /// Why there are no more meetings.
    ended: Option<String>,
}

/// A socket, and what has arrived of messages.
#[derive(Debug)]
struct Link {
    stream: TcpStream,
    arrived: Vec<u8>,
    closed: bool,
    /// When it became known that the other has come to its end.
    left: Option<Instant>,
}

fn of_socket(what: &str, error: &std::io::Error) -> Error {
    Error::Msg(format!("parallel: {what}: {error}"))
}

impl Link {
    fn new(stream: TcpStream) -> Result<Self> {
        let set = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
        set.map_err(|error| of_socket("a socket between processes", &error))?;
        Ok(Self { stream, arrived: vec![], closed: false, left: None })
    }

    /// Reads what is there.
    fn look(&mut self) {
        let mut piece = [0u8; 4096];
        while !self.closed {
            match self.stream.read(&mut piece) {
                Ok(0) => self.closed = true,
                Ok(length) => self.arrived.extend(&piece[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.closed = true,
            }
        }
        if self.first() == Some(&[LEFT]) {
            self.left.get_or_insert_with(Instant::now);
        }
    }

    /// The next message, which stays.
    fn first(&self) -> Option<&[u8]> {
        let (length, rest) = self.arrived.split_first_chunk::<8>()?;
        rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)
    }

    /// What is waited for: a message, or none of a rank that has left.
    fn news(&mut self) -> Option<Option<Vec<u8>>> {
        self.look();
        if self.left.is_some() {
            return Some(None);
        }
        let message = self.first().map(<[u8]>::to_vec);
        match message {
            Some(message) => {
                self.arrived.drain(..8 + message.len());
                Some(Some(message))
            }
            None if self.closed => Some(None),
            None => None,
        }
    }

    /// Whether it could be sent before `end`.
    fn send(&mut self, message: &[u8], end: Instant) -> bool {
        let mut bytes = (message.len() as u64).to_le_bytes().to_vec();
        bytes.extend(message);
        let mut rest = bytes.as_slice();
        let sent = until(end, || match self.stream.write(rest) {
            Ok(written) => {
                rest = &rest[written..];
                Ok(rest.is_empty().then_some(()))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(Error::wrap(error)),
        });
        matches!(sent, Ok(Some(())))
    }
}

impl Meeting {
    /// Meets the others at `address` (`host:port`), where rank 0 listens. All have to be there within `limit`.
    ///
    /// # Errors
    /// When one is not, or the address is another program's; on rank 0 and those that have come with the ranks that are missing.
    pub fn open(rank: usize, size: usize, address: &str, limit: Duration) -> Result<Self> {
        if rank >= size {
            bail!("parallel: expected a rank below the number of processes {size}, got {rank}")
        }
        let end = Instant::now() + limit;
        let of = if rank == 0 {
            listen(size, address, end, limit)?
        } else {
            vec![Some(join(rank, size, address, end, limit)?)]
        };
        let meeting =
            Self { rank, size, limit: Mutex::new(limit), links: Mutex::new(Links { of, ended: None }) };
        // Rank 0 says whether all are there.
        meeting.gather(&[])?;
        meeting.set_time_limit(TIME_LIMIT);
        Ok(meeting)
    }

    fn limit(&self) -> Duration {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sums of numbers of `N` bytes.
    fn sum<T: Copy + std::ops::AddAssign, const N: usize>(
        &self,
        values: &mut [T],
        written: fn(T) -> [u8; N],
        read: fn([u8; N]) -> T,
    ) -> Result<()> {
        let own: Vec<u8> = values.iter().flat_map(|value| written(*value)).collect();
        let numbers = |row: &Vec<u8>| row.as_chunks().0.iter().map(|bytes| read(*bytes)).collect();
        add(values, &self.gather(&own)?.iter().map(numbers).collect::<Vec<_>>())
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn left(rank: usize) -> String {
    format!("parallel: rank {rank} has left, and the others wait for it")
}

fn missing(ranks: impl Iterator<Item = usize>, limit: Duration) -> String {
    let ranks: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
    format!("parallel: rank {} did not come within {} s", ranks.join(", "), limit.as_secs_f64())
}

/// The sockets of all others. One that does not come within the time is missing at the first roll call.
fn listen(size: usize, address: &str, end: Instant, limit: Duration) -> Result<Vec<Option<Link>>> {
    // On all of this machine's networks: the address is what the others call it.
    let port = address.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
    let Some(port) = port else { bail!("parallel: expected an address host:port, got {address}") };
    let refused = |error| of_socket(&format!("rank 0 cannot listen at port {port} (MASTER_PORT)"), &error);
    let listener = TcpListener::bind(("0.0.0.0", port)).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let mut of: Vec<Option<Link>> = (0..size).map(|_| None).collect();
    // Those that have not said who they are.
    let mut strangers = vec![];
    let all = until(end, || {
        while let Ok((stream, _)) = listener.accept() {
            strangers.push(Link::new(stream)?);
        }
        let mut index = 0;
        while index < strangers.len() {
            let Some(said) = strangers[index].news() else {
                index += 1;
                continue;
            };
            let link = strangers.swap_remove(index);
            // What is not one of us is not answered.
            let Some((rank, theirs)) = said.as_deref().and_then(greeted) else { continue };
            if theirs != size || rank == 0 || rank >= size {
                bail!("parallel: rank {rank} of {theirs} processes came, expected the others of {size}")
            }
            if of[rank].replace(link).is_some() {
                bail!("parallel: two processes say that they are rank {rank} (RANK)")
            }
        }
        Ok((1..size).all(|rank| of[rank].is_some()).then_some(()))
    })?;
    if all.is_none() {
        let sentence = missing((1..size).filter(|&rank| of[rank].is_none()), limit);
        let mut links = Links { of, ended: None };
        links.tell(&sentence);
        return links.end(sentence);
    }
    Ok(of)
}

/// How long the last message of a meeting that ends may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn greeting(rank: usize, size: usize) -> Vec<u8> {
    let mut said = GREETING.to_vec();
    said.extend((rank as u64).to_le_bytes());
    said.extend((size as u64).to_le_bytes());
    said
}

fn greeted(said: &[u8]) -> Option<(usize, usize)> {
    let (rank, size) = said.strip_prefix(GREETING)?.split_at_checked(8)?;
    let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?) as usize);
    Some((number(rank)?, number(size)?))
}

/// The socket to rank 0, who may begin later.
fn join(rank: usize, size: usize, address: &str, end: Instant, limit: Duration) -> Result<Link> {
    let mut last = None;
    let stream = until(end, || {
        // A name may stand for several addresses, at not all of which rank 0 listens.
        let tried = address.to_socket_addrs().and_then(|found| {
            let mut tried = Err(ErrorKind::NotFound.into());
            for found in found {
                tried = TcpStream::connect_timeout(&found, Duration::from_secs(1)).and_then(not_with_itself);
                if tried.is_ok() {
                    break;
                }
            }
            tried
        });
        match tried {
            Ok(stream) => Ok(Some(stream)),
            Err(error) => {
                last = Some(error);
                std::thread::sleep(Duration::from_millis(20));
                Ok(None)
            }
        }
    })?;
    let Some(stream) = stream else {
        let why = last.map(|error| format!(" ({error})")).unwrap_or_default();
        bail!("{}: nobody listens at {address}{why}", missing(std::iter::once(0), limit))
    };
    let mut link = Link::new(stream)?;
    if !link.send(&greeting(rank, size), end) {
        bail!("{}", left(0))
    }
    Ok(link)
}

/// A socket that waits for a port of this machine may be given that port, and meets itself.
fn not_with_itself(stream: TcpStream) -> std::io::Result<TcpStream> {
    match stream.local_addr()? == stream.peer_addr()? {
        true => Err(ErrorKind::ConnectionRefused.into()),
        false => Ok(stream),
    }
}

impl Links {
    /// Says to all others why there are no more meetings.
    fn tell(&mut self, sentence: &str) {
        let mut verdict = vec![WHY];
        verdict.extend(sentence.as_bytes());
        for link in self.of.iter_mut().flatten() {
            link.send(&verdict, Instant::now() + LAST_WORDS);
        }
    }

    fn end<T>(&mut self, sentence: String) -> Result<T> {
        self.ended = Some(sentence.clone());
        // Sockets that are closed tell the others.
        self.of.clear();
        Err(Error::Msg(sentence))
    }

    /// Rank 0's side of a roll call.
    fn hear(&mut self, own: &[u8], limit: Duration) -> Result<Vec<Vec<u8>>> {
        let mut reports: Vec<Option<Vec<u8>>> = self.of.iter().map(|_| None).collect();
        reports[0] = Some(own.to_vec());
        let mut gone = None;
        until(Instant::now() + limit, || {
            for (rank, link) in self.of.iter_mut().enumerate() {
                let Some(link) = link.as_mut().filter(|_| reports[rank].is_none()) else { continue };
                match link.news() {
                    Some(Some(report)) => reports[rank] = Some(report.get(1..).unwrap_or_default().to_vec()),
                    Some(None) => gone = gone.or(Some(rank)),
                    None => {}
                }
            }
            Ok((gone.is_some() || reports.iter().all(Option::is_some)).then_some(()))
        })?;
        let lacking = reports.iter().enumerate().filter(|(_, report)| report.is_none()).map(|(rank, _)| rank);
        let sentence = match gone {
            Some(rank) => Some(left(rank)),
            None if reports.iter().any(Option::is_none) => Some(missing(lacking, limit)),
            None => None,
        };
        if let Some(sentence) = sentence {
            self.tell(&sentence);
            return self.end(sentence);
        }
        let reports: Vec<Vec<u8>> = reports.into_iter().flatten().collect();
        let mut verdict = vec![ALL];
        for report in &reports {
            verdict.extend((report.len() as u64).to_le_bytes());
            verdict.extend(report);
        }
        let end = Instant::now() + limit;
        let mut unsent = None;
        for (rank, link) in self.of.iter_mut().enumerate() {
            if let Some(link) = link
                && !link.send(&verdict, end)
            {
                unsent = unsent.or(Some(rank));
            }
        }
        match unsent {
            Some(rank) => self.end(left(rank)),
            None => Ok(reports),
        }
    }

    /// The others' side.
    fn report(&mut self, own: &[u8], limit: Duration) -> Result<Vec<Vec<u8>>> {
        // Rank 0 says who is missing when its own time is over.
        let end = Instant::now() + limit + limit / 4 + Duration::from_secs(1);
        let Some(Some(link)) = self.of.first_mut() else { return self.end(left(0)) };
        // Where it cannot be sent, what rank 0 said last may be there.
        let mut report = vec![ALL];
        report.extend(own);
        link.send(&report, end);
        match until(end, || Ok(link.news()))? {
            Some(Some(verdict)) => match verdict.split_first() {
                Some((&ALL, rest)) => Ok(pieces(rest)),
                Some((_, sentence)) => self.end(String::from_utf8_lossy(sentence).into_owned()),
                None => self.end("parallel: rank 0 sends an empty answer".into()),
            },
            Some(None) => self.end(left(0)),
            None => self.end(missing(std::iter::once(0), limit)),
        }
    }
}

impl Communicator for Meeting {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (limit, mut links) = (self.limit(), self.links());
        if let Some(sentence) = &links.ended {
            bail!("{sentence}")
        }
        if self.rank == 0 { links.hear(bytes, limit) } else { links.report(bytes, limit) }
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.sum(values, f64::to_le_bytes, f64::from_le_bytes)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.sum(values, f32::to_le_bytes, f32::from_le_bytes)
    }

    fn trouble(&self) -> Option<String> {
        let (grace, mut links) = (GRACE.min(self.limit() / 2), self.links());
        if links.ended.is_some() {
            return links.ended.clone();
        }
        for (rank, link) in links.of.iter_mut().enumerate() {
            let Some(link) = link else { continue };
            link.look();
            // Rank 0 says who is gone. All else is for the next roll call.
            let said = link.first().and_then(|said| said.strip_prefix(&[WHY])).filter(|_| self.rank != 0);
            let gone = match link.left {
                Some(since) => since.elapsed() > grace,
                None => link.closed,
            };
            let sentence = match said {
                Some(said) => String::from_utf8_lossy(said).into_owned(),
                None if gone => left(rank),
                None => continue,
            };
            if self.rank == 0 {
                links.tell(&sentence);
            }
            return links.end::<()>(sentence).err().and(links.ended.clone());
        }
        None
    }

    fn time_limit(&self) -> Duration {
        self.limit()
    }

    fn set_time_limit(&self, limit: Duration) {
        *self.limit.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    fn abort(&self, why: &str) {
        let mut links = self.links();
        links.ended.get_or_insert_with(|| format!("parallel: {why}"));
        links.of.clear();
    }
}

impl Drop for Meeting {
    /// Says to the others that this rank has come to its end, and waits for theirs: who is still in a message is not to take it for dead.
    fn drop(&mut self) {
        let limit = self.limit();
        let links = self.links.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut left = vec![];
        for mut link in std::mem::take(&mut links.of).into_iter().flatten() {
            if link.send(&[LEFT], Instant::now() + LAST_WORDS) {
                left.push(link);
            }
        }
        // Nobody is left to be told that it could not be waited for.
        let _ = until(Instant::now() + limit, || {
            left.retain_mut(|link| !matches!(link.news(), Some(None)));
            Ok(left.is_empty().then_some(()))
        });
    }
}

#[cfg(test)]
mod tests;
