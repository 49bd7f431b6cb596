//! Whether all threads of a workgroup, or none, come to each barrier of a shader, and all threads of a subgroup, or none,
//! to each operation of subgroups: validation does not look.
//!
//! The rule. A value is uniform where all threads of a group have the same one: constants, the workgroup's id, the
//! subgroup's where the group is a subgroup, what lies at a uniform place of a uniform, of storage that is only read or of
//! workgroup memory, and what is computed from these alone. A thread's own ids, storage that is written, results of
//! subgroups and what a pointer parameter points to are not. A variable is uniform where all that is ever stored to it is, in uniform control flow. Control flow is
//! uniform inside of conditions that are, and as long as no thread may have left on its own: by `return` for the rest of
//! the function, by `break` for all of the loop, by `continue` for the rest of its body.
//!
//! Of workgroup memory the rule believes that a barrier lies between a write and the reads, so that all threads read the
//! same; WGSL's own analysis asks for `workgroupUniformLoad` instead.

use std::collections::{BTreeSet, HashMap, HashSet};

use naga::{
    AddressSpace, Binding, Block, BuiltIn, Expression, Function, GlobalVariable, Handle, LocalVariable, Module,
    Statement, StorageAccess,
};

/// The barriers and subgroup operations of an entry point, by their functions.
#[derive(Debug, Default)]
pub struct Barriers {
    pub all: BTreeSet<String>,
    /// Those that some threads may come to without the others.
    pub faulty: BTreeSet<String>,
}

/// Looks at all that an entry point calls.
pub fn barriers(module: &Module, entry: &str) -> Barriers {
    let entry = module.entry_points.iter().find(|point| point.name == entry).expect("the entry point is there");
    let mut barriers = Barriers::default();
    for group in [Group::Workgroup, Group::Subgroup] {
        let arguments = entry.function.arguments.iter().map(|argument| match argument.binding {
            Some(Binding::BuiltIn(builtin)) => group.shares(builtin),
            _ => false,
        });
        let arguments: Vec<bool> = arguments.collect();
        let mut walk = Walk { module, group, private: HashSet::new(), barriers };
        loop {
            let known = walk.private.len();
            walk.function(&entry.function, &entry.name, arguments.clone(), true);
            if walk.private.len() == known {
                break;
            }
        }
        barriers = walk.barriers;
    }
    barriers
}

/// Threads that have to stay together.
#[derive(Clone, Copy, PartialEq)]
enum Group {
    Workgroup,
    Subgroup,
}

impl Group {
    /// Whether all of its threads have the same value.
    fn shares(self, builtin: BuiltIn) -> bool {
        match builtin {
            BuiltIn::WorkGroupId | BuiltIn::NumWorkGroups | BuiltIn::WorkGroupSize => true,
            BuiltIn::NumSubgroups | BuiltIn::SubgroupSize | BuiltIn::SubgroupId => self == Group::Subgroup,
            _ => false,
        }
    }
}

struct Walk<'a> {
    module: &'a Module,
    group: Group,
    /// Private variables that are not uniform. Grows until nothing new is found, as do all sets here.
    private: HashSet<Handle<GlobalVariable>>,
    barriers: Barriers,
}

/// One call of a function.
struct Frame<'a> {
    function: &'a Function,
    name: &'a str,
    /// Which arguments are uniform.
    arguments: Vec<bool>,
    /// Variables that are not uniform.
    locals: HashSet<Handle<LocalVariable>>,
    /// What calls in it gave.
    results: HashMap<Handle<Expression>, bool>,
    result: bool,
}

/// How some threads may have left a block while others went on.
#[derive(Clone, Copy, Default)]
struct Left {
    breaks: bool,
    continues: bool,
    returns: bool,
}

impl Left {
    fn any(self) -> bool {
        self.breaks || self.continues || self.returns
    }

    fn and(self, other: Left) -> Left {
        Left {
            breaks: self.breaks || other.breaks,
            continues: self.continues || other.continues,
            returns: self.returns || other.returns,
        }
    }
}

impl<'a> Walk<'a> {
    /// Walks a function; true where its result is uniform.
    fn function(&mut self, function: &'a Function, name: &'a str, arguments: Vec<bool>, control: bool) -> bool {
        let (locals, results) = (HashSet::new(), HashMap::new());
        let mut frame = Frame { function, name, arguments, locals, results, result: true };
        for (handle, local) in function.local_variables.iter() {
            if local.init.is_some_and(|init| !self.is_uniform(&frame, init)) {
                frame.locals.insert(handle);
            }
        }
        loop {
            let known = (frame.locals.len(), self.private.len());
            self.block(&mut frame, &function.body, control);
            if (frame.locals.len(), self.private.len()) == known {
                return frame.result;
            }
        }
    }

    fn block(&mut self, frame: &mut Frame<'a>, block: &'a Block, control: bool) -> Left {
        let mut left = Left::default();
        for statement in block.iter() {
            left = left.and(self.statement(frame, statement, control && !left.any()));
        }
        left
    }

    fn statement(&mut self, frame: &mut Frame<'a>, statement: &'a Statement, control: bool) -> Left {
        let mut left = Left::default();
        match statement {
            Statement::Block(block) => return self.block(frame, block, control),
            Statement::If { condition, accept, reject } => {
                let inner = control && self.is_uniform(frame, *condition);
                return self.block(frame, accept, inner).and(self.block(frame, reject, inner));
            }
            Statement::Switch { selector, cases } => {
                let inner = control && self.is_uniform(frame, *selector);
                let bodies = cases.iter().fold(left, |left, case| left.and(self.block(frame, &case.body, inner)));
                return Left { breaks: false, ..bodies };
            }
            Statement::Loop { body, continuing, break_if } => {
                let mut inner = control;
                loop {
                    let mut once = Left { continues: false, ..self.block(frame, body, inner) };
                    let end = inner && !once.any();
                    once = once.and(self.block(frame, continuing, end));
                    once.breaks |= break_if.is_some_and(|condition| !self.is_uniform(frame, condition));
                    if !inner || !once.any() {
                        return Left { returns: once.returns, ..left };
                    }
                    inner = false;
                }
            }
            Statement::Break => left.breaks = !control,
            Statement::Continue => left.continues = !control,
            Statement::Kill => left.returns = !control,
            Statement::Return { value } => {
                left.returns = !control;
                frame.result &= control && value.is_none_or(|value| self.is_uniform(frame, value));
            }
            Statement::ControlBarrier(_) => self.barrier(frame, Group::Workgroup, "a barrier", control),
            Statement::WorkGroupUniformLoad { .. } => {
                self.barrier(frame, Group::Workgroup, "a workgroupUniformLoad", control);
            }
            Statement::SubgroupBallot { .. }
            | Statement::SubgroupGather { .. }
            | Statement::SubgroupCollectiveOperation { .. }
            | Statement::CooperativeStore { .. } => {
                self.barrier(frame, Group::Subgroup, "a subgroup operation", control);
            }
            Statement::Emit(range) => {
                let expressions = range.clone().map(|handle| &frame.function.expressions[handle]);
                let is_shared = |e: &Expression| {
                    matches!(e, Expression::CooperativeLoad { .. } | Expression::CooperativeMultiplyAdd { .. })
                };
                if expressions.into_iter().any(is_shared) {
                    self.barrier(frame, Group::Subgroup, "a cooperative matrix operation", control);
                }
            }
            Statement::Store { pointer, value }
                if !(control && self.is_uniform(frame, *value) && self.is_uniform(frame, *pointer)) =>
            {
                self.spoil(frame, *pointer);
            }
            Statement::Call { function, arguments, result } => {
                let uniform: Vec<bool> = arguments.iter().map(|a| self.is_uniform(frame, *a)).collect();
                // What a function does to a variable that it is given is not followed.
                arguments.iter().for_each(|argument| self.spoil(frame, *argument));
                let called = &self.module.functions[*function];
                let name = called.name.as_deref().unwrap_or("a function");
                let uniform = self.function(called, name, uniform, control);
                if let Some(result) = result {
                    *frame.results.entry(*result).or_insert(true) &= uniform;
                }
            }
            // Neither waits, nor gives a value that counts as uniform.
            _ => {}
        }
        left
    }

    /// Notes what threads of `group` have to come to together.
    fn barrier(&mut self, frame: &Frame, group: Group, what: &str, control: bool) {
        if group != self.group {
            return;
        }
        let place = format!("{what} in {}", frame.name);
        if !control {
            self.barriers.faulty.insert(place.clone());
        }
        self.barriers.all.insert(place);
    }

    /// Marks the variable that a pointer leads to; other expressions are none.
    fn spoil(&mut self, frame: &mut Frame, pointer: Handle<Expression>) {
        match frame.function.expressions[pointer] {
            Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => self.spoil(frame, base),
            Expression::LocalVariable(local) => drop(frame.locals.insert(local)),
            Expression::GlobalVariable(global)
                if self.module.global_variables[global].space == AddressSpace::Private =>
            {
                self.private.insert(global);
            }
            _ => {}
        }
    }

    fn is_uniform(&self, frame: &Frame, expression: Handle<Expression>) -> bool {
        let is = |e: Handle<Expression>| self.is_uniform(frame, e);
        match &frame.function.expressions[expression] {
            Expression::Literal(_)
            | Expression::Constant(_)
            | Expression::Override(_)
            | Expression::ZeroValue(_)
            | Expression::ArrayLength(_)
            | Expression::WorkGroupUniformLoadResult { .. } => true,
            Expression::Compose { components, .. } => components.iter().all(|e| is(*e)),
            Expression::Access { base, index } => is(*base) && is(*index),
            Expression::AccessIndex { base: e, .. }
            | Expression::Splat { value: e, .. }
            | Expression::Swizzle { vector: e, .. }
            | Expression::Load { pointer: e }
            | Expression::Unary { expr: e, .. }
            | Expression::Relational { argument: e, .. }
            | Expression::As { expr: e, .. } => is(*e),
            Expression::Binary { left, right, .. } => is(*left) && is(*right),
            Expression::Select { condition, accept, reject } => is(*condition) && is(*accept) && is(*reject),
            Expression::Math { arg, arg1, arg2, arg3, .. } => {
                [Some(*arg), *arg1, *arg2, *arg3].into_iter().flatten().all(is)
            }
            Expression::FunctionArgument(i) => frame.arguments[*i as usize],
            Expression::LocalVariable(local) => !frame.locals.contains(local),
            Expression::GlobalVariable(global) => match self.module.global_variables[*global].space {
                AddressSpace::Uniform | AddressSpace::WorkGroup | AddressSpace::Immediate => true,
                AddressSpace::Storage { access } => !access.contains(StorageAccess::STORE),
                AddressSpace::Private => !self.private.contains(global),
                _ => false,
            },
            Expression::CallResult(_) => frame.results.get(&expression).copied().unwrap_or(false),
            _ => false,
        }
    }
}
