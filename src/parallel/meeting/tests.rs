//! Meetings on one machine.

use super::*;

/// A port that is free, or was a moment ago.
fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

fn ranks<T: Send>(size: usize, f: impl Fn(Meeting) -> Result<T> + Sync) -> Vec<Result<T>> {
    let address = format!("127.0.0.1:{}", port());
    let open = |rank| Meeting::open(rank, size, &address, Duration::from_secs(20));
    std::thread::scope(|scope| {
        let (open, f) = (&open, &f);
        let ranks: Vec<_> = (0..size).map(|rank| scope.spawn(move || f(open(rank)?))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

#[test]
fn all_have_what_all_bring() -> Result<()> {
    let found = ranks(3, |meeting| {
        let rank = meeting.rank();
        let gathered = meeting.gather(&vec![rank as u8; 5000 * rank])?;
        assert_eq!(gathered.iter().map(Vec::len).collect::<Vec<_>>(), [0, 5000, 10000]);
        assert!(gathered[2].iter().all(|&byte| byte == 2));
        let mut values = [rank as f64 + 0.5, -1.0];
        meeting.sum_f64(&mut values)?;
        assert_eq!(values, [4.5, -3.0]);
        assert!(meeting.trouble().is_none());
        Ok(())
    });
    found.into_iter().collect()
}

#[test]
fn who_leaves_has_a_name() {
    for gone in 0..3 {
        let found = ranks(3, |meeting| {
            if meeting.rank() == gone {
                return Ok(());
            }
            meeting.gather(&[])?;
            Ok(())
        });
        for (rank, outcome) in found.into_iter().enumerate().filter(|(rank, _)| *rank != gone) {
            let said = outcome.expect_err("a rank is gone").to_string();
            assert!(said.contains(&format!("rank {gone} has left")), "rank {rank} of gone {gone}: {said}");
        }
    }
}

#[test]
fn who_dies_is_known_without_a_call() {
    let found = ranks(3, |meeting| {
        if meeting.rank() == 1 {
            // Closed without a word.
            meeting.abort("a kill");
            return Ok(None);
        }
        until(Instant::now() + Duration::from_secs(20), || Ok(meeting.trouble()))
    });
    for rank in [0, 2] {
        let said = found[rank].as_ref().expect("no error").clone().unwrap_or_default();
        assert!(said.contains("rank 1 has left"), "rank {rank}: {said}");
    }
}

#[test]
fn sockets_that_meet_themselves_are_refused() {
    let port = port();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let socket = |_| TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok();
    // Whether one does is the system's choice of a port.
    for stream in (0..200).filter_map(socket) {
        assert!(not_with_itself(stream).is_err());
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("a socket");
    assert!(not_with_itself(stream).is_ok());
}

#[test]
fn who_does_not_come_has_a_name() {
    let address = format!("127.0.0.1:{}", port());
    let limit = Duration::from_millis(400);
    let open = |rank| Meeting::open(rank, 3, &address, limit).map(drop);
    let outcomes = std::thread::scope(|scope| {
        let ranks: Vec<_> = [0, 2].map(|rank| scope.spawn(move || open(rank))).into();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect::<Vec<_>>()
    });
    for outcome in outcomes {
        let said = outcome.expect_err("a rank is missing").to_string();
        assert!(said.contains("rank 1 did not come within 0.4 s"), "{said}");
    }
    let alone = Meeting::open(1, 2, &address, limit).expect_err("nobody is there").to_string();
    assert!(alone.contains("rank 0 did not come within 0.4 s: nobody listens at"), "{alone}");
    assert!(Meeting::open(2, 2, &address, limit).is_err());
}

#[test]
fn who_hangs_has_a_name() {
    let found = ranks(3, |meeting| {
        meeting.set_time_limit(Duration::from_millis(300));
        if meeting.rank() == 2 {
            std::thread::sleep(Duration::from_secs(1));
            return Ok(());
        }
        meeting.gather(&[]).map(drop)
    });
    for outcome in found.into_iter().take(2) {
        let said = outcome.expect_err("rank 2 hangs").to_string();
        assert!(said.contains("rank 2 did not come within 0.3 s"), "{said}");
    }
}
