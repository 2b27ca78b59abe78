//! What a rank gives all others at a meeting: bytes, and tensors, which stay on a GPU where the engine takes them there.

use super::bytes::{Reader, Writer, bytes_of};
use super::communicator::Transfer;
use super::world::{Place, Trouble, World};
use candle_core::{DType, Device, Result, Tensor};

/// What a rank gives all others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parcel {
    pub bytes: Vec<u8>,
    pub tensors: Vec<Tensor>,
}

impl Parcel {
    /// How many bytes it is.
    pub fn size(&self) -> usize {
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.bytes.len() + self.tensors.iter().map(size).sum::<usize>()
    }

    /// As a message; of tensors that go by themselves the forms alone.
    fn written(&self, by_themselves: bool) -> Result<Vec<u8>> {
        let mut message = Writer::default();
        message.bytes(&self.bytes);
        message.number(self.tensors.len());
        for tensor in &self.tensors {
            message.form(tensor);
            if !by_themselves {
                message.bytes(&bytes_of(tensor)?);
            }
        }
        Ok(message.0)
    }

    /// The inverse; a tensor that goes by itself has no value yet.
    fn read(message: &[u8], by_themselves: bool, device: &Device) -> Result<Self> {
        let mut reader = Reader(message);
        let bytes = reader.bytes()?.to_vec();
        let mut tensors = vec![];
        for _ in 0..reader.number()? {
            let (dtype, dims) = reader.form()?;
            tensors.push(match by_themselves {
                true => Tensor::zeros(dims, dtype, device)?,
                false => reader.tensor_of(dtype, &dims, device)?,
            });
        }
        Ok(Self { bytes, tensors })
    }
}

impl World {
    /// Gives all ranks this one's parcel, or its trouble, and gets theirs, in their order, with tensors on `device`. A rank's own tensors are
    /// those that it gave.
    pub(crate) fn exchange_parcels(
        &self,
        place: Place,
        device: &Device,
        own: std::result::Result<Parcel, Trouble>,
    ) -> std::result::Result<Vec<Parcel>, Trouble> {
        let failed = |error: candle_core::Error| Trouble::failed(&error);
        let by_themselves = self.takes(device);
        let own = own.and_then(|own| {
            // A source has to lie in a piece.
            let there = |tensor: &Tensor| tensor.to_device(device)?.contiguous();
            let tensors = own.tensors.iter().map(there).collect::<Result<Vec<_>>>().map_err(failed)?;
            Ok(Parcel { tensors, ..own })
        });
        let message = match &own {
            Ok(own) => own.written(by_themselves).map_err(failed),
            Err(trouble) => Err(trouble.clone()),
        };
        let messages = self.exchange(place, message)?;
        let mut own = Some(own?);
        let parcel = |(rank, message): (usize, &Vec<u8>)| match own.take_if(|_| rank == self.rank()) {
            Some(own) => Ok(own),
            None => Parcel::read(message, by_themselves, device),
        };
        let parcels = messages.iter().enumerate().map(parcel).collect::<Result<Vec<_>>>().map_err(failed);
        if by_themselves || !device.is_cpu() {
            // All must have room for the tensors before anybody waits for them, and must have got them before anybody goes on with them. On
            // the CPU there is always room.
            self.exchange(place, parcels.as_ref().map(|_| vec![]).map_err(Trouble::clone))?;
        }
        let mut parcels = parcels?;
        if by_themselves {
            let from = |(rank, parcel): (usize, &Parcel)| {
                parcel.tensors.iter().map(|tensor| (Transfer::From(rank), tensor.clone())).collect::<Vec<_>>()
            };
            let all = parcels.iter().enumerate().flat_map(from).collect();
            let mut arrived = self.transfer(all).map_err(failed)?.into_iter();
            for tensor in parcels.iter_mut().flat_map(|parcel| &mut parcel.tensors) {
                if let Some(value) = arrived.next() {
                    *tensor = value;
                }
            }
        }
        Ok(parcels)
    }

    /// Rank 0's tensor, on the others, who each have one like `own`.
    pub(crate) fn tensor_of_first(
        &self,
        place: Place,
        own: &Tensor,
    ) -> std::result::Result<Option<Tensor>, Trouble> {
        let tensors = if self.is_first() { vec![own.clone()] } else { vec![] };
        let parcel = Parcel { bytes: vec![], tensors };
        let mut parcels = self.exchange_parcels(place, own.device(), Ok(parcel))?;
        Ok(parcels.first_mut().and_then(|parcel| parcel.tensors.pop()).filter(|_| !self.is_first()))
    }
}

impl Writer {
    /// A tensor's element type and shape.
    fn form(&mut self, tensor: &Tensor) {
        self.bytes(tensor.dtype().as_str().as_bytes());
        self.number(tensor.rank());
        tensor.dims().iter().for_each(|&dim| self.number(dim));
    }

    /// With its shape and element type.
    pub fn tensor(&mut self, tensor: &Tensor) -> Result<()> {
        self.form(tensor);
        self.bytes(&bytes_of(tensor)?);
        Ok(())
    }
}

impl Reader<'_> {
    fn form(&mut self) -> Result<(DType, Vec<usize>)> {
        let dtype =
            String::from_utf8_lossy(self.bytes()?).parse::<DType>().map_err(candle_core::Error::wrap)?;
        let rank = self.number()?;
        Ok((dtype, (0..rank).map(|_| self.number()).collect::<Result<Vec<_>>>()?))
    }

    fn tensor_of(&mut self, dtype: DType, dims: &[usize], device: &Device) -> Result<Tensor> {
        super::bytes::tensor_of(self.bytes()?, dims, dtype, device)
    }

    pub fn tensor(&mut self, device: &Device) -> Result<Tensor> {
        let (dtype, dims) = self.form()?;
        self.tensor_of(dtype, &dims, device)
    }
}

/// Threads whose tensors go as those of GPUs do that stay there.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::parallel::{Communicator, Threads};
    use std::time::Duration;

    #[derive(Debug)]
    struct Staying(World);

    impl Communicator for Staying {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn size(&self) -> usize {
            self.0.size()
        }

        fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
            self.0.engine().gather(bytes)
        }

        fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
            self.0.engine().sum_f64(values)
        }

        fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
            self.0.engine().sum_f32(values)
        }

        fn takes(&self, _: &Device) -> bool {
            true
        }

        fn set_time_limit(&self, limit: Duration) {
            self.0.set_time_limit(limit);
        }

        fn abort(&self, why: &str) {
            self.0.engine().abort(why);
        }
    }

    /// A world for each of `size` threads.
    pub fn worlds(size: usize) -> Vec<World> {
        Threads::worlds(size).into_iter().map(|world| World::new(Staying(world))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Threads;
    use std::time::Duration;

    /// A tensor that cannot be sent is said on all, and nobody waits for it, nor for rank 0's.
    #[test]
    fn what_cannot_be_sent_is_said_on_all() {
        let run = |world: &World, of: usize| {
            world.set_time_limit(Duration::from_secs(20));
            let place = Place { of: "test", call: "parcels", step: 0 };
            let dtype = if world.rank() == of { DType::U32 } else { DType::F32 };
            let tensor = Tensor::zeros(3, dtype, &Device::Cpu).map_err(|error| Trouble::failed(&error))?;
            match of {
                0 => world.tensor_of_first(place, &tensor).map(drop),
                _ => {
                    let parcel = Parcel { bytes: vec![], tensors: vec![tensor] };
                    world.exchange_parcels(place, &Device::Cpu, Ok(parcel)).map(drop)
                }
            }
        };
        for of in [0, 1] {
            for worlds in [Threads::worlds(3), testing::worlds(3)] {
                std::thread::scope(|scope| {
                    let ranks: Vec<_> =
                        worlds.into_iter().map(|world| scope.spawn(move || run(&world, of))).collect();
                    for rank in ranks {
                        let said = rank.join().expect("a rank").expect_err("U32").error().to_string();
                        let expected =
                            format!("rank {of}: parallel: expected a tensor of f64, f32, f16 or bf16");
                        assert!(said.starts_with(&expected), "{said}");
                    }
                });
            }
        }
    }

    #[test]
    fn all_have_what_each_gave() -> Result<()> {
        for worlds in [Threads::worlds(3), testing::worlds(3)] {
            let found: Vec<_> = std::thread::scope(|scope| {
                let rank = |world: World| -> Result<Vec<Parcel>> {
                    let rank = world.rank();
                    // Of several shapes and types, empty ones, and from rank 1 none.
                    let tensors = match rank {
                        1 => vec![],
                        _ => vec![
                            Tensor::full(rank as f32 + 0.5, (2, rank), &Device::Cpu)?,
                            Tensor::full(rank as f64, (1, 3), &Device::Cpu)?.t()?,
                        ],
                    };
                    let parcel = Parcel { bytes: vec![rank as u8; rank], tensors };
                    let place = Place { of: "test", call: "parcels", step: 0 };
                    world.exchange_parcels(place, &Device::Cpu, Ok(parcel)).map_err(Trouble::error)
                };
                let ranks: Vec<_> =
                    worlds.into_iter().map(|world| scope.spawn(move || rank(world))).collect();
                ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
            });
            for parcels in found {
                let parcels = parcels?;
                let bytes: Vec<&[u8]> = parcels.iter().map(|parcel| parcel.bytes.as_slice()).collect();
                assert_eq!(bytes, [&[][..], &[1], &[2, 2]]);
                assert_eq!([0, 1, 2].map(|rank| parcels[rank].tensors.len()), [2, 0, 2]);
                assert_eq!(parcels[0].tensors[0].dims(), [2, 0]);
                assert_eq!(parcels[2].tensors[0].to_vec2::<f32>()?, [[2.5, 2.5], [2.5, 2.5]]);
                assert_eq!(parcels[2].tensors[1].to_vec2::<f64>()?, [[2.0], [2.0], [2.0]]);
            }
        }
        Ok(())
    }
}
