//! The in-process API, as the model card of Llama-3.2-1B-Instruct-FP8 deploys the model.

use std::ops::ControlFlow;

use quaver::core::engine::FinishReason;
use quaver::{Llm, Progress, Prompt, Request, SamplingParams};
use serde_json::json;

#[test]
fn the_model_cards_deployment_answers_a_list_of_prompts() {
    let mut llm = Llm::demo().unwrap();
    let params =
        SamplingParams { temperature: 0.6, top_p: 0.9, max_tokens: 256, seed: Some(7), ..llm.sampling_defaults() };
    let conversations = ["Who is Captain Hook?", "What is the capital of France?"].map(|question| {
        json!([
            {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
            {"role": "user", "content": question},
        ])
    });
    let outputs = llm.chat(&conversations, &params).unwrap();
    assert_eq!(outputs.len(), 2);
    for output in &outputs {
        assert!(!output.text.is_empty() && !output.text.contains("<|"), "{:?}", output.text);
        assert!(output.token_ids.len() <= 256);
        let stopped = output.finish_reason == FinishReason::Stop;
        assert!(stopped || output.token_ids.len() == 256, "{:?}", output.finish_reason);
    }
    // A seed gives the same text again, whatever else is in the batch.
    let again = llm.chat(&conversations[1..], &params).unwrap();
    assert_eq!((&again[0].text, &again[0].token_ids), (&outputs[1].text, &outputs[1].token_ids));
}

#[test]
fn a_rendered_prompt_gets_no_second_begin_of_text() {
    let llm = Llm::demo().unwrap();
    let ids = llm.encode(&Prompt::Text("<|begin_of_text|>It was".into())).unwrap();
    assert_eq!(ids, llm.encode(&Prompt::Text("It was".into())).unwrap());
}

#[test]
fn pieces_of_text_add_up_and_a_request_can_be_broken_off() {
    let mut llm = Llm::demo().unwrap();
    let params = SamplingParams { temperature: 0.0, max_tokens: 40, ..llm.sampling_defaults() };
    let request = |text: &str| Request { prompt: Prompt::Text(text.into()), params: params.clone(), stop: Vec::new() };
    let (mut pieces, mut done) = ([String::new(), String::new()], [0, 0]);
    let outputs = llm.run(vec![request("It was a cold"), request("The old house")], |i, progress| {
        match progress {
            Progress::Text(text) => pieces[i].push_str(text),
            Progress::Done => done[i] += 1,
        }
        if i == 1 && pieces[1].len() > 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let outputs = outputs.unwrap();
    assert_eq!([&outputs[0].text, &outputs[1].text], [&pieces[0], &pieces[1]]);
    assert_eq!(done, [1, 1]);
    assert_eq!((outputs[0].token_ids.len(), outputs[0].finish_reason), (40, FinishReason::Length));
    assert!(outputs[1].token_ids.len() < 40);
}
