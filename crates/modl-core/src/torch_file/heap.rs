//! What a pickle is made of: plain values, containers, tensors and their storages.

use crate::Kind;

/// What a pickle is made of. Containers and tensors are numbers of those in [`Heap`]: pickles
/// change containers after they have been named.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Text(&'a str),
    /// A number that nothing here needs: a float, or one of more than 64 bits.
    Number,
    Name(Name),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

/// The names that are known, all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Name {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// Elements of one kind.
    Storage(Kind),
}

impl Name {
    pub(super) fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Name::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Name::RebuildParameter,
            ("torch", "FloatStorage") => Name::Storage(Kind::Float),
            ("torch", "DoubleStorage") => Name::Storage(Kind::Double),
            ("torch", "HalfStorage") => Name::Storage(Kind::Half),
            ("torch", "BFloat16Storage") => Name::Storage(Kind::BFloat16),
            ("torch", "LongStorage") => Name::Storage(Kind::Int64),
            ("torch", "IntStorage") => Name::Storage(Kind::Int),
            ("torch", "ShortStorage") => Name::Storage(Kind::Int16),
            ("torch", "CharStorage") => Name::Storage(Kind::Int8),
            ("torch", "ByteStorage") => Name::Storage(Kind::Uint8),
            ("torch", "BoolStorage") => Name::Storage(Kind::Bool),
            _ => return None,
        })
    }
}

/// Elements in a row, which the file has under `key`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) kind: Kind,
    pub(super) elements: u64,
}

/// A tensor: a view of a storage, in elements.
#[derive(Debug, Clone)]
pub(super) struct View<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: u64,
    pub(super) size: Vec<u64>,
    pub(super) stride: Vec<u64>,
}

/// What a pickle has made.
#[derive(Debug, Default)]
pub(super) struct Heap<'a> {
    /// Tuples and lists.
    pub(super) rows: Vec<Vec<Value<'a>>>,
    pub(super) dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) views: Vec<View<'a>>,
}

impl<'a> Heap<'a> {
    /// The elements of a tuple or list; none of anything else.
    pub(super) fn row(&self, value: Value<'a>) -> &[Value<'a>] {
        match value {
            Value::Tuple(i) | Value::List(i) => self.rows.get(i).map_or(&[], Vec::as_slice),
            _ => &[],
        }
    }

    /// The entries of a dictionary; none of anything else.
    pub(super) fn entries(&self, value: Value<'a>) -> &[(Value<'a>, Value<'a>)] {
        match value {
            Value::Dict(i) => self.dicts.get(i).map_or(&[], Vec::as_slice),
            _ => &[],
        }
    }

    pub(super) fn view(&self, i: usize) -> Option<&View<'a>> {
        self.views.get(i)
    }
}
