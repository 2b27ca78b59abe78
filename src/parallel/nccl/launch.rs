//! What torchrun or OpenMPI's mpirun say of a process in its environment.

use candle_core::{Result, bail};

/// What a launcher says.
#[derive(Debug, PartialEq)]
pub(super) struct Launch {
    pub rank: usize,
    pub size: usize,
    /// Where rank 0 listens, `host:port`.
    pub address: String,
}

impl Launch {
    /// Of environment variables; nothing where there are none.
    pub fn of(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| match get(name).map(|text| text.parse::<usize>().map_err(|_| text)) {
            None => Ok(None),
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(text)) => {
                bail!("parallel: expected a number in the environment variable {name}, got {text}")
            }
        };
        let mut found = None;
        for (rank, size) in [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")] {
            match (number(rank)?, number(size)?) {
                (Some(rank), Some(size)) => {
                    found = Some((rank, size));
                    break;
                }
                (None, None) => {}
                (Some(_), None) => {
                    bail!("parallel: expected {size} beside {rank} in the environment, got none")
                }
                (None, Some(_)) => {
                    bail!("parallel: expected {rank} beside {size} in the environment, got none")
                }
            }
        }
        let Some((rank, size)) = found else { return Ok(None) };
        let here = number("OMPI_COMM_WORLD_LOCAL_SIZE")? == Some(size);
        let host = match get("MASTER_ADDR") {
            Some(host) => host,
            None if here || size == 1 => "127.0.0.1".into(),
            None => bail!(
                "parallel: expected the host of rank 0 in the environment variable MASTER_ADDR, got none"
            ),
        };
        let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text.eq_ignore_ascii_case("true"));
        let port = number("MASTER_PORT")?.unwrap_or(29_500).saturating_add(usize::from(taken));
        if port > usize::from(u16::MAX) {
            bail!("parallel: expected a port in the environment variable MASTER_PORT, got {port}")
        }
        Ok(Some(Self { rank, size, address: format!("{host}:{port}") }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        let get = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        };
        Launch::of(&get)
    }

    #[test]
    fn launchers_say_who_a_process_is() -> Result<()> {
        let torchrun =
            [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "gpu-7"), ("MASTER_PORT", "1234")];
        let of = |rank, size, address: &str| Some(Launch { rank, size, address: address.into() });
        assert_eq!(launch(&torchrun)?, of(1, 4, "gpu-7:1234"));
        let with_store = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(launch(&with_store)?, of(1, 4, "gpu-7:1235"));
        let mpirun = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert!(launch(&mpirun).expect_err("where?").to_string().contains("MASTER_ADDR"));
        let here = [&mpirun[..], &[("OMPI_COMM_WORLD_LOCAL_SIZE", "2")]].concat();
        assert_eq!(launch(&here)?, of(0, 2, "127.0.0.1:29500"));
        assert_eq!(launch(&[])?, None);
        for (wrong, said) in [
            (&[("RANK", "1")][..], "expected WORLD_SIZE beside RANK"),
            (&[("WORLD_SIZE", "2")], "expected RANK beside WORLD_SIZE"),
            (
                &[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")],
                "expected a port in the environment variable MASTER_PORT, got 70000",
            ),
            (
                &[("RANK", "one"), ("WORLD_SIZE", "2")],
                "expected a number in the environment variable RANK, got one",
            ),
        ] {
            let found = launch(wrong).expect_err("wrong").to_string();
            assert!(found.contains(said), "{found}");
        }
        Ok(())
    }
}
