//! The in-process API: a model that takes text or tokens and gives text.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use quaver_backends::Spec;
use quaver_core::Result;
use quaver_core::checkpoint::Checkpoint;
use quaver_core::engine::{Engine, EngineOptions, FinishReason, Output, RequestId, Token};
use quaver_core::op::DeviceInfo;
use quaver_core::sampler::SamplingParams;
use serde_json::Value;

use crate::model;
use crate::text::{AnswerText, StopStrings, TokenizerReading};
use crate::text_model::{Prompt, TextModel, chat_template};

/// How a model is opened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LlmOptions {
    /// The device.
    pub device: Spec,
    /// Profile, context and memory.
    pub engine: EngineOptions,
    /// Take a model that is named by its Hugging Face id from the cache, without any request.
    pub offline: bool,
    /// Read the tokenizer when it is needed first, instead of beside the weights: where prompts are token ids, their
    /// first token does not wait for it.
    pub defer_tokenizer: bool,
}

/// What happens to a request while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Text that is certain now.
    Text(&'a str),
    /// The answer is complete.
    Done,
}

/// One prompt, and how to go on from there.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// How to choose tokens, and when to stop.
    pub params: SamplingParams,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without special tokens.
    pub text: String,
    /// Every token that was generated, an end-of-text token included.
    pub token_ids: Vec<u32>,
    /// The prompt's tokens.
    pub prompt_token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One a token, where asked for.
    pub logprobs: Option<Vec<Token>>,
    /// One a token of the prompt, None for the first, where asked for.
    pub prompt_logprobs: Option<Vec<Option<Token>>>,
    /// From the start of the batch to this answer's first token.
    pub ttft_ms: f64,
    /// Tokens a second behind the first one; 0 where there is none.
    pub decode_tokens_per_s: f64,
}

/// A model on a device.
///
/// ```
/// use quaver::{Llm, SamplingParams};
///
/// let mut llm = Llm::demo()?;
/// let params = SamplingParams { temperature: 0.0, max_tokens: 32, ..llm.sampling_defaults() };
/// let outputs = llm.chat(&[serde_json::json!([{"role": "user", "content": "Who is Captain Hook?"}])], &params)?;
/// assert_eq!(outputs[0].text, "Captain Hook is a pirate, and the great enemy of Peter Pan.");
/// # Ok::<(), quaver::Error>(())
/// ```
pub struct Llm {
    engine: Engine,
    text: TextModel,
}

impl Llm {
    /// Opens a model on the best device of this machine: a folder, or a Hugging Face id such as
    /// `RedHatAI/Llama-3.2-1B-Instruct-FP8` (see [`files`](crate::files)).
    ///
    /// ```no_run
    /// use quaver::Llm;
    ///
    /// let mut llm = Llm::open("RedHatAI/Llama-3.2-1B-Instruct-FP8")?;
    /// let params = llm.sampling_defaults();
    /// for output in llm.generate(&["The capital of France is"], &params)? {
    ///     println!("{}", output.text);
    /// }
    /// # Ok::<(), quaver::Error>(())
    /// ```
    pub fn open(model: &str) -> Result<Self> {
        Self::with_options(Some(model), &LlmOptions::default())
    }

    /// Opens the built-in demo model.
    pub fn demo() -> Result<Self> {
        Self::with_options(None, &LlmOptions::default())
    }

    /// Opens a model in a folder or of the hub, or the demo model, with options.
    pub fn with_options(model: Option<&str>, options: &LlmOptions) -> Result<Self> {
        let files = model::files(model, options.offline)?;
        let reading = |json| Arc::new(TokenizerReading::new(json, !options.defer_tokenizer));
        let tokenizer = files.get("tokenizer.json")?.map(reading);
        let checkpoint = Checkpoint::open(files.clone())?;
        let engine = Engine::new(&checkpoint, quaver_backends::open(&options.device)?, &options.engine)?;
        let text = TextModel {
            name: files.name(),
            defaults: checkpoint.generation().clone(),
            tokenizer,
            template: chat_template(&files)?,
            context: engine.max_model_len(),
        };
        Ok(Llm { engine, text })
    }

    /// The engine, and what turns text into its tokens and back: for a server, which has them in different threads.
    pub fn into_parts(self) -> (Engine, TextModel) {
        (self.engine, self.text)
    }

    /// The model's name: its folder as it was given, its Hugging Face id, or `quaver-demo`.
    pub fn name(&self) -> &str {
        &self.text.name
    }

    /// What it runs on.
    pub fn device(&self) -> DeviceInfo {
        self.engine.device()
    }

    /// Tokens that a prompt and its answer can have together.
    pub fn max_model_len(&self) -> usize {
        self.engine.max_model_len()
    }

    /// True where the model brings a tokenizer; without one it takes and gives token ids alone.
    pub fn has_tokenizer(&self) -> bool {
        self.text.tokenizer.is_some()
    }

    /// True where the model brings a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.text.template.is_some()
    }

    /// The sampling that the model's `generation_config.json` recommends.
    pub fn sampling_defaults(&self) -> SamplingParams {
        self.text.defaults.sampling()
    }

    /// Continues texts, as one batch; the outputs are in the order of the prompts.
    pub fn generate(&mut self, prompts: &[impl AsRef<str>], params: &SamplingParams) -> Result<Vec<Completion>> {
        self.run_all(prompts.iter().map(|prompt| Prompt::Text(prompt.as_ref().to_owned())), params)
    }

    /// Answers conversations (OpenAI `messages` arrays), as one batch.
    pub fn chat(&mut self, conversations: &[Value], params: &SamplingParams) -> Result<Vec<Completion>> {
        self.run_all(conversations.iter().cloned().map(Prompt::Messages), params)
    }

    fn run_all(&mut self, prompts: impl Iterator<Item = Prompt>, params: &SamplingParams) -> Result<Vec<Completion>> {
        let request = |prompt| Request { prompt, params: params.clone(), stop: Vec::new() };
        self.run(prompts.map(request).collect(), |_, _| ControlFlow::Continue(()))
    }

    /// The tokens of a prompt.
    ///
    /// ```
    /// use quaver::{Llm, Prompt};
    ///
    /// let llm = Llm::demo()?;
    /// assert_eq!(llm.encode(&Prompt::Text("It was".into()))?, [4080, 895, 305]);
    /// # Ok::<(), quaver::Error>(())
    /// ```
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        self.text.encode(prompt)
    }

    /// Runs requests as one batch. `on_progress` is called with a request's number and each piece of its text as soon as
    /// it is certain; where it breaks, that request ends there.
    pub fn run(
        &mut self,
        requests: Vec<Request>,
        mut on_progress: impl FnMut(usize, Progress) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>> {
        let start = Instant::now();
        let (mut answers, mut numbers) = (Vec::new(), HashMap::new());
        let submitted = requests.into_iter().try_for_each(|request| {
            let answer = Answer::submit(self, request)?;
            numbers.insert(answer.id, answers.len());
            answers.push(answer);
            Ok(())
        });
        let run = submitted.and_then(|()| {
            while !self.engine.is_idle() {
                for (id, output) in self.engine.step()? {
                    let Some(&i) = numbers.get(&id) else { continue };
                    let flow = answers[i].take(output, start, &mut |text| on_progress(i, Progress::Text(text)))?;
                    if flow.is_break() && answers[i].finish_reason.is_none() {
                        answers[i].finish_reason = Some(FinishReason::Stop);
                        self.engine.cancel(id);
                    }
                    if answers[i].finish_reason.is_some() {
                        // There is nothing left to break off.
                        let _ = on_progress(i, Progress::Done);
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = run {
            answers.iter().for_each(|answer| self.engine.cancel(answer.id));
            return Err(error);
        }
        Ok(answers.into_iter().map(Answer::completion).collect())
    }
}

/// A request under way.
struct Answer {
    id: RequestId,
    /// What the text is made with when the first token is there, and not before: token ids do without.
    tokenizer: Option<Arc<TokenizerReading>>,
    writer: Option<AnswerText>,
    stops: StopStrings,
    min_tokens: usize,
    text: String,
    token_ids: Vec<u32>,
    prompt_token_ids: Vec<u32>,
    finish_reason: Option<FinishReason>,
    logprobs: Option<Vec<Token>>,
    prompt_logprobs: Option<Vec<Option<Token>>>,
    first: Option<(Instant, f64)>,
    last: Option<Instant>,
}

impl Answer {
    fn submit(llm: &mut Llm, request: Request) -> Result<Self> {
        let Request { prompt, params, stop } = request;
        let stops = StopStrings::new(&stop)?;
        let prompt_token_ids = llm.encode(&prompt)?;
        let (logprobs, min_tokens) = (params.logprobs.map(|_| Vec::new()), params.min_tokens);
        let prompt_logprobs = params.prompt_logprobs.map(|_| vec![None]);
        Ok(Answer {
            id: llm.engine.submit(&prompt_token_ids, params)?,
            tokenizer: llm.text.tokenizer.clone(),
            writer: None,
            stops,
            min_tokens,
            text: String::new(),
            token_ids: Vec::new(),
            prompt_token_ids,
            finish_reason: None,
            logprobs,
            prompt_logprobs,
            first: None,
            last: None,
        })
    }

    /// Takes what a step brought; breaks where the request should end.
    fn take(
        &mut self,
        output: Output,
        start: Instant,
        on_text: &mut impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        match output {
            Output::Begun { .. } => Ok(ControlFlow::Continue(())),
            Output::Prompt(scores) => {
                if let Some(logprobs) = &mut self.prompt_logprobs {
                    logprobs.extend(scores.into_iter().map(Some));
                }
                Ok(ControlFlow::Continue(()))
            }
            Output::Token(token) => {
                let now = Instant::now();
                self.first.get_or_insert_with(|| (now, (now - start).as_secs_f64() * 1e3));
                self.last = Some(now);
                self.token_ids.push(token.id);
                if let (None, Some(tokenizer)) = (&self.writer, &self.tokenizer) {
                    let detokenizer = tokenizer.get()?.detokenizer(true);
                    self.writer = Some(AnswerText::new(detokenizer, self.stops.clone(), self.min_tokens));
                }
                let piece = self.writer.as_mut().map(|w| w.push(token.id)).transpose()?.unwrap_or_default();
                if let Some(logprobs) = &mut self.logprobs {
                    logprobs.push(token);
                }
                let flow = self.emit(&piece.text, on_text);
                Ok(if piece.stopped.is_some() { ControlFlow::Break(()) } else { flow })
            }
            Output::Finished(reason) => {
                self.finish_reason = Some(reason);
                let rest = self.writer.as_mut().map(AnswerText::finish).unwrap_or_default();
                Ok(self.emit(&rest.text, on_text))
            }
            Output::Failed(error) => Err(error),
        }
    }

    fn emit(&mut self, text: &str, on_text: &mut impl FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
        if text.is_empty() {
            return ControlFlow::Continue(());
        }
        self.text.push_str(text);
        on_text(text)
    }

    fn completion(self) -> Completion {
        let decode_s = self.first.zip(self.last).map_or(0.0, |((first, _), last)| (last - first).as_secs_f64());
        let decoded = self.token_ids.len().saturating_sub(1) as f64;
        Completion {
            text: self.text,
            token_ids: self.token_ids,
            prompt_token_ids: self.prompt_token_ids,
            finish_reason: self.finish_reason.expect("the engine ends every request before it is idle"),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            ttft_ms: self.first.map_or(0.0, |(_, ms)| ms),
            decode_tokens_per_s: if decode_s > 0.0 { decoded / decode_s } else { 0.0 },
        }
    }
}
