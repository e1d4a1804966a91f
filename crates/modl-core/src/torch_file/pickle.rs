//! A pickle as data: a stack machine for what PyTorch writes for tensors in dictionaries and lists.
//!
//! Python's pickles are programs that may call any function by name. Nothing is called here: the
//! few names that are known stand for dictionaries, tensors and their storages, and any other name
//! or opcode is refused by name. Each opcode makes at most one value, and values are small, so that
//! memory is bounded by the pickle's length.

use std::collections::HashMap;

use super::Refusal;
use super::bytes::Bytes;
use super::heap::{Heap, Name, Storage, Value, View};

/// A pickle is at most so long; a hundred bytes or two are one tensor's.
const MOST_BYTES: usize = 1 << 24;

/// Tensors have at most so many dimensions.
const MOST_DIMS: usize = 16;

/// Reads the pickle at the start of `bytes`: its value, and how long it is.
pub(super) fn read<'a>(
    bytes: &'a [u8],
    heap: &mut Heap<'a>,
) -> Result<(Value<'a>, usize), Refusal> {
    let within = bytes.get(..MOST_BYTES).unwrap_or(bytes);
    let mut machine =
        Machine { r: Bytes::new(within), heap, stack: vec![], marks: vec![], memo: HashMap::new() };
    loop {
        let done = machine.step();
        let at = machine.r.position();
        match done {
            Ok(None) => {}
            Ok(Some(value)) => return Ok((value, at)),
            Err(_) if bytes.len() > MOST_BYTES && at + 16 > MOST_BYTES => {
                let problem = format!("its pickle is longer than {MOST_BYTES} bytes");
                return Err(Refusal::Foreign(problem));
            }
            Err(e) => return Err(e),
        }
    }
}

struct Machine<'a, 'h> {
    r: Bytes<'a>,
    heap: &'h mut Heap<'a>,
    stack: Vec<Value<'a>>,
    /// Lengths of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
}

impl<'a> Machine<'a, '_> {
    /// Runs one opcode; the value at the end of the pickle.
    fn step(&mut self) -> Result<Option<Value<'a>>, Refusal> {
        let opcode = self.r.u8()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            // The protocol, and the length of a frame: nothing depends on them.
            0x80 => self.r.skip(1)?,
            0x95 => self.r.skip(8)?,
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' | b'K' | b'M' | 0x8a | b'G' => self.number(opcode)?,
            b'X' | 0x8c | 0x8d | b'T' | b'U' => self.text(opcode)?,
            b')' | b't' | 0x85 | 0x86 | 0x87 => self.tuple(opcode)?,
            b']' => {
                self.heap.rows.push(Vec::new());
                self.stack.push(Value::List(self.heap.rows.len() - 1));
            }
            b'}' => self.new_dict(),
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let values = self.since_mark()?;
                self.append(values)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let values = self.since_mark()?;
                self.set_items(&values)?;
            }
            b'c' => {
                let (module, name) = (self.r.line()?, self.r.line()?);
                self.name(module, name)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.name(module, name)?,
                _ => return Err("a name in it is no text".into()),
            },
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'Q' => self.persistent()?,
            b'q' | b'r' | 0x94 => self.remember(opcode)?,
            b'h' | b'j' => self.recall(opcode)?,
            other => {
                return Err(Refusal::Foreign(format!("its pickle has {}", opcode_name(other))));
            }
        }
        Ok(None)
    }

    fn pop(&mut self) -> Result<Value<'a>, Refusal> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let value = if self.stack.len() > floor { self.stack.pop() } else { None };
        value.ok_or("its pickle takes what is not there".into())
    }

    /// What has been pushed since the last mark, which goes.
    fn since_mark(&mut self) -> Result<Vec<Value<'a>>, Refusal> {
        let mark = self.marks.pop().ok_or("its pickle has no mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn number(&mut self, opcode: u8) -> Result<(), Refusal> {
        let value = match opcode {
            b'J' => Value::Int(self.r.i32()?.into()),
            b'K' => Value::Int(self.r.u8()?.into()),
            b'M' => Value::Int(self.r.u16()?.into()),
            b'G' => {
                self.r.skip(8)?;
                Value::Number
            }
            _ => {
                let n = self.r.u8()?;
                whole(self.r.take(n.into())?)
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn text(&mut self, opcode: u8) -> Result<(), Refusal> {
        let n = match opcode {
            0x8c | b'U' => self.r.u8()?.into(),
            0x8d => self.r.u64()?,
            _ => self.r.u32()?.into(),
        };
        let text = self.r.text(n)?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn tuple(&mut self, opcode: u8) -> Result<(), Refusal> {
        let values = match opcode {
            b')' => Vec::new(),
            b't' => self.since_mark()?,
            _ => {
                let mut values = vec![self.pop()?];
                for _ in 0x85..opcode {
                    values.push(self.pop()?);
                }
                values.reverse();
                values
            }
        };
        self.heap.rows.push(values);
        self.stack.push(Value::Tuple(self.heap.rows.len() - 1));
        Ok(())
    }

    fn new_dict(&mut self) {
        self.heap.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.heap.dicts.len() - 1));
    }

    /// Adds to the list on top.
    fn append(&mut self, values: Vec<Value<'a>>) -> Result<(), Refusal> {
        match self.stack.last() {
            Some(Value::List(i)) => self.heap.rows.get_mut(*i).map(|row| row.extend(values)),
            _ => None,
        }
        .ok_or_else(|| "its pickle adds to what is no list".into())
    }

    /// Adds keys and values in turn to the dictionary on top.
    fn set_items(&mut self, values: &[Value<'a>]) -> Result<(), Refusal> {
        let dict = match self.stack.last() {
            Some(Value::Dict(i)) => self.heap.dicts.get_mut(*i),
            _ => None,
        };
        let dict = dict.ok_or("its pickle adds to what is no dictionary")?;
        if !values.len().is_multiple_of(2) {
            return Err("its pickle has a key without a value".into());
        }
        dict.extend(
            values.chunks_exact(2).filter_map(|pair| Some((*pair.first()?, *pair.get(1)?))),
        );
        Ok(())
    }

    fn name(&mut self, module: &str, name: &str) -> Result<(), Refusal> {
        match Name::of(module, name) {
            Some(known) => self.stack.push(Value::Name(known)),
            None => return Err(Refusal::Foreign(format!("its pickle names `{module}.{name}`"))),
        }
        Ok(())
    }

    fn reduce(&mut self) -> Result<(), Refusal> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let row = self.heap.row(arguments);
        match (function, row) {
            (Value::Name(Name::OrderedDict), []) => self.new_dict(),
            (Value::Name(Name::RebuildParameter), [Value::Tensor(i), ..]) => {
                self.stack.push(Value::Tensor(*i));
            }
            (
                Value::Name(Name::RebuildTensor),
                [Value::Storage(storage), Value::Int(offset), size, stride, ..],
            ) => {
                let view = self.heap.storages.get(*storage).and_then(|storage| {
                    let offset = u64::try_from(*offset).ok()?;
                    let (size, stride) = (self.lengths(*size)?, self.lengths(*stride)?);
                    (size.len() == stride.len()).then_some(View {
                        storage: *storage,
                        offset,
                        size,
                        stride,
                    })
                });
                self.heap.views.push(view.ok_or("a tensor in it has no shape")?);
                self.stack.push(Value::Tensor(self.heap.views.len() - 1));
            }
            (Value::Name(name), _) => {
                let problem =
                    format!("its pickle calls {name:?} with other arguments than PyTorch");
                return Err(Refusal::Foreign(problem));
            }
            _ => return Err(Refusal::Foreign("its pickle calls what is no function".into())),
        }
        Ok(())
    }

    fn lengths(&self, tuple: Value<'a>) -> Option<Vec<u64>> {
        let row = match tuple {
            Value::Tuple(_) => self.heap.row(tuple),
            _ => return None,
        };
        let length = |v: &Value| match v {
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        };
        (row.len() <= MOST_DIMS).then(|| row.iter().map(length).collect())?
    }

    /// Attributes of a dictionary, which PyTorch keeps versions in: they are left out.
    fn build(&mut self) -> Result<(), Refusal> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err(Refusal::Foreign("its pickle sets attributes of an object".into())),
        }
    }

    /// A storage: what PyTorch keeps outside the pickle.
    fn persistent(&mut self) -> Result<(), Refusal> {
        let id = self.pop()?;
        // Files from before version 1.6 say last of what the storage is a view: of none.
        let parts = match self.heap.row(id) {
            [parts @ .., Value::None] => parts,
            parts => parts,
        };
        let storage = match parts {
            [
                Value::Text("storage"),
                Value::Name(Name::Storage(kind)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(elements),
            ] => {
                u64::try_from(*elements).ok().map(|elements| Storage { key, kind: *kind, elements })
            }
            _ => None,
        };
        let storage = storage.ok_or_else(|| {
            Refusal::Foreign("its pickle refers to something outside that is no storage".into())
        })?;
        self.heap.storages.push(storage);
        self.stack.push(Value::Storage(self.heap.storages.len() - 1));
        Ok(())
    }

    fn remember(&mut self, opcode: u8) -> Result<(), Refusal> {
        let place = match opcode {
            b'q' => self.r.u8()?.into(),
            b'r' => self.r.u32()?,
            _ => self.memo.len() as u32,
        };
        let top = self.stack.last().ok_or("its pickle keeps nothing")?;
        self.memo.insert(place, *top);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), Refusal> {
        let place = if opcode == b'h' { self.r.u8()?.into() } else { self.r.u32()? };
        let kept = self.memo.get(&place);
        self.stack.push(*kept.ok_or_else(|| format!("its pickle has kept nothing at {place}"))?);
        Ok(())
    }
}

/// The whole number in little-endian two's complement.
fn whole<'a>(bytes: &[u8]) -> Value<'a> {
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    match all.get_mut(..bytes.len()) {
        Some(low) => low.copy_from_slice(bytes),
        None => return Value::Number,
    }
    Value::Int(i64::from_le_bytes(all))
}

/// An opcode that is refused, as Python calls it.
fn opcode_name(opcode: u8) -> String {
    let name = match opcode {
        0x81 | 0x92 | b'i' | b'o' => "an object of a class",
        0x82..=0x84 => "an object of the extension registry",
        b'P' => "an identifier as a line of text",
        b'B' | b'C' | 0x8e | 0x96..=0x98 => "plain bytes",
        0x8f..=0x91 => "a set",
        _ => "something that PyTorch does not write",
    };
    format!("{name} (opcode {opcode:#04x})")
}
