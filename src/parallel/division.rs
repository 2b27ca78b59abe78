//! Work that ranks divide: each does a part of the jobs, and all have the results.

use super::bytes::{Reader, Writer};
use super::parcel::Parcel;
use super::world::{Place, Trouble, World, named};
use candle_core::{Device, Error, Result, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Jobs on matrices with fewer rows take less time than a message.
const WORTH_IT: usize = 32;

/// Work that ranks divide.
#[derive(Debug, Clone)]
pub(crate) struct Division {
    world: World,
    of: &'static str,
    /// The jobs that this rank did, and the bytes that it gave the others.
    done: Arc<AtomicUsize>,
    sent: Arc<AtomicUsize>,
}

/// Who does which of jobs of the orders `orders`, `n^3` each: the largest first, each to whom has the least to do. None, all do, where a job
/// is not worth a message.
pub(crate) fn owners(orders: &[usize], ranks: usize) -> Vec<Option<usize>> {
    let large: Vec<usize> = (0..orders.len()).filter(|&job| orders[job] >= WORTH_IT).collect();
    let costs: Vec<f64> = large.iter().map(|&job| (orders[job] as f64).powi(3)).collect();
    let mut owners = vec![None; orders.len()];
    for (job, owner) in large.into_iter().zip(spread(&costs, ranks)) {
        owners[job] = Some(owner);
    }
    owners
}

/// Who does which of jobs of these costs: the dearest first, each to whom has the least to do.
pub(crate) fn spread(costs: &[f64], ranks: usize) -> Vec<usize> {
    let mut owners = vec![0; costs.len()];
    let mut load = vec![0f64; ranks];
    let mut dearest_first: Vec<usize> = (0..costs.len()).collect();
    dearest_first.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]));
    for job in dearest_first {
        let least = (0..ranks).min_by(|&a, &b| load[a].total_cmp(&load[b])).unwrap_or(0);
        owners[job] = least;
        load[least] += costs[job];
    }
    owners
}

impl Division {
    pub fn new(world: &World, of: &'static str) -> Self {
        Self { world: world.clone(), of, done: Arc::default(), sent: Arc::default() }
    }

    /// The jobs that this rank did itself.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// The bytes that this rank gave the others.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    /// The results of jobs, of the orders `orders`: those of this rank by `compute`, which is told their numbers, the others' from them.
    /// `parts` and `whole` take a result apart and make it of the parts again. What failed on its owner has failed on all, with the owner's rank.
    pub fn all<T>(
        &self,
        orders: &[usize],
        device: &Device,
        compute: impl FnOnce(&[usize]) -> Vec<Result<T>>,
        parts: impl Fn(&T) -> Vec<Tensor>,
        whole: impl Fn(Vec<Tensor>) -> Result<T>,
    ) -> Vec<Result<T>> {
        let (rank, owners) = (self.world.rank(), owners(orders, self.world.size()));
        let own: Vec<usize> =
            (0..orders.len()).filter(|&job| owners[job].is_none_or(|o| o == rank)).collect();
        let mut found: Vec<Option<Result<T>>> = orders.iter().map(|_| None).collect();
        for (job, result) in own.iter().zip(compute(&own)) {
            found[*job] = Some(result);
        }
        self.done.fetch_add(own.len(), Ordering::Relaxed);
        if owners.iter().any(Option::is_some)
            && let Err(error) = self.exchange(&owners, device, &mut found, parts, whole)
        {
            return orders.iter().map(|_| Err(Error::Msg(error.clone()))).collect();
        }
        let missing = || Err(Error::Msg("parallel: a job of this rank has no result".into()));
        found.into_iter().map(|result| result.unwrap_or_else(missing)).collect()
    }

    fn exchange<T>(
        &self,
        owners: &[Option<usize>],
        device: &Device,
        found: &mut [Option<Result<T>>],
        parts: impl Fn(&T) -> Vec<Tensor>,
        whole: impl Fn(Vec<Tensor>) -> Result<T>,
    ) -> std::result::Result<(), String> {
        let rank = self.world.rank();
        let text = |error: &Error| match Trouble::failed(error) {
            Trouble::NonFinite(what) | Trouble::Failed(what) => what,
        };
        let (mut message, mut tensors) = (Writer::default(), vec![]);
        for (job, _) in owners.iter().enumerate().filter(|(_, owner)| **owner == Some(rank)) {
            let why = match &found[job] {
                Some(Ok(result)) => {
                    let parts = parts(result);
                    message.number(parts.len());
                    tensors.extend(parts);
                    continue;
                }
                Some(Err(error)) => text(error),
                None => "no result".into(),
            };
            let why = named(rank, &why);
            message.number(0);
            message.bytes(why.as_bytes());
            found[job] = Some(Err(Error::Msg(why)));
        }
        let parcel = Parcel { bytes: message.0, tensors };
        self.sent.fetch_add(parcel.size() * (self.world.size() - 1), Ordering::Relaxed);
        let place = Place { of: self.of, call: "inverses", step: 0 };
        let parcels = self.world.exchange_parcels(place, device, Ok(parcel));
        let parcels = parcels.map_err(|trouble| text(&trouble.error()))?;
        let mut arrived: Vec<_> =
            parcels.iter().map(|parcel| (Reader(&parcel.bytes), parcel.tensors.iter())).collect();
        let mut read = || -> Result<()> {
            for (job, owner) in owners.iter().enumerate() {
                let Some((owner, (reader, tensors))) = owner.and_then(|o| Some((o, arrived.get_mut(o)?)))
                else {
                    continue;
                };
                let count = reader.number()?;
                let result = match count {
                    0 => Err(Error::Msg(String::from_utf8_lossy(reader.bytes()?).into_owned())),
                    _ => Ok(tensors.by_ref().take(count).cloned().collect()),
                };
                // An owner's own is the same, and need not come back.
                if owner != rank {
                    found[job] = Some(match result {
                        Ok(parts) => Ok(whole(parts)?),
                        Err(error) => Err(error),
                    });
                }
            }
            Ok(())
        };
        // A result that one could not make use of is nobody's, or they would part.
        let read = read().map(|()| vec![]).map_err(|error| Trouble::failed(&error));
        self.world.meet(place, read).map(drop).map_err(|trouble| text(&trouble.error()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Threads;
    use super::*;
    use candle_core::{DType, bail};

    #[test]
    fn the_largest_jobs_go_to_whom_has_least_to_do() {
        // 8^3 = 7.4 * 4.1^3: the others together are less than the first.
        assert_eq!(
            owners(&[784, 300, 300, 100, 100, 10], 2),
            [Some(0), Some(1), Some(1), Some(1), Some(1), None]
        );
        assert_eq!(owners(&[64, 64, 64, 64], 2), [Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!(owners(&[8, 31], 3), [None, None]);
    }

    #[test]
    fn what_one_cannot_make_use_of_is_nobodys() {
        let run = |world: World| -> Vec<String> {
            world.set_time_limit(std::time::Duration::from_secs(20));
            let found = Division::new(&world, "test").all(
                &[40, 50],
                &Device::Cpu,
                |jobs| jobs.iter().map(|_| Tensor::zeros(2, DType::F64, &Device::Cpu)).collect(),
                |tensor| vec![tensor.clone()],
                |mut tensors| match world.rank() {
                    1 => bail!("no room"),
                    _ => Ok(tensors.remove(0)),
                },
            );
            let said = |result: Result<Tensor>| result.err().map_or(String::new(), |e| e.to_string());
            found.into_iter().map(said).collect()
        };
        std::thread::scope(|scope| {
            let run = &run;
            let ranks: Vec<_> = Threads::worlds(3).into_iter().map(|w| scope.spawn(move || run(w))).collect();
            for rank in ranks {
                for said in rank.join().expect("a rank") {
                    assert!(said.starts_with("rank 1: no room"), "{said}");
                }
            }
        });
    }

    #[test]
    fn each_does_its_part_and_all_have_all() -> Result<()> {
        const ORDERS: [usize; 4] = [40, 8, 50, 60];
        let run = |world: World| -> Result<(Vec<Vec<f64>>, Vec<String>, usize)> {
            let (rank, division) = (world.rank() as f64, Division::new(&world, "test"));
            let found = division.all(
                &ORDERS,
                &Device::Cpu,
                |jobs| {
                    let result = |&job: &usize| match job {
                        2 => bail!("job 2 cannot be done by rank {rank}"),
                        _ => Tensor::new(&[job as f64, rank], &Device::Cpu),
                    };
                    jobs.iter().map(result).collect()
                },
                |tensor| vec![tensor.clone()],
                |mut tensors| Ok(tensors.remove(0)),
            );
            let (mut values, mut errors) = (vec![], vec![]);
            for result in found {
                match result {
                    Ok(tensor) => values.push(tensor.to_vec1()?),
                    Err(error) => {
                        errors.push(error.to_string().lines().next().unwrap_or_default().to_string())
                    }
                }
            }
            Ok((values, errors, division.done()))
        };
        let threads: Vec<_> =
            Threads::worlds(2).into_iter().map(|world| std::thread::spawn(move || run(world))).collect();
        for (rank, thread) in threads.into_iter().enumerate() {
            let (values, errors, done) = thread.join().expect("a rank")?;
            // Of 60, 50 and 40 rank 0 has the first and rank 1 the others; 8 is everybody's.
            assert_eq!(values, [[0.0, 1.0], [1.0, rank as f64], [3.0, 0.0]]);
            assert_eq!(errors, ["rank 1: job 2 cannot be done by rank 1"]);
            assert_eq!(done, [2, 3][rank]);
        }
        Ok(())
    }
}
