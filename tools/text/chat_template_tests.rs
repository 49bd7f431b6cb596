use super::*;
use serde_json::json;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_files(None, Some(source.as_bytes())).unwrap().unwrap()
}

fn render(source: &str) -> Result<String> {
    template(source).render(&json!([{"role": "user", "content": "Hi"}]), &RenderOptions::default())
}

fn refused(source: &str) -> String {
    render(source).unwrap_err().to_string()
}

fn config_refused(config: Value) -> String {
    ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).unwrap_err().to_string()
}

#[test]
fn files_without_a_template_have_none() {
    assert!(ChatTemplate::from_files(None, None).unwrap().is_none());
    assert!(ChatTemplate::from_files(Some(b"{}"), None).unwrap().is_none());
    assert!(ChatTemplate::from_files(Some(br#"{"chat_template": null}"#), None).unwrap().is_none());
}

#[test]
fn the_jinja_file_wins() {
    let template = ChatTemplate::from_files(Some(br#"{"chat_template": "config"}"#), Some(b"file")).unwrap().unwrap();
    assert_eq!(template.render(&json!([{"role": "user"}]), &RenderOptions::default()).unwrap(), "file");
}

#[test]
fn tools_choose_the_tool_template() {
    let config = json!({"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].name }}"}]});
    let template = ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).unwrap().unwrap();
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let mut options = RenderOptions::default();
    assert_eq!(template.render(&messages, &options).unwrap(), "plain");
    options.tools = Some(json!([{"name": "f"}]));
    assert_eq!(template.render(&messages, &options).unwrap(), "f");
}

#[test]
fn special_tokens_come_from_both_files() {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}"});
    let template = ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).unwrap().unwrap();
    let template =
        template.with_special_tokens_map(br#"{"bos_token": "other", "pad_token": {"content": "P"}}"#).unwrap();
    let text = template.render(&json!([{"role": "user"}]), &RenderOptions::default()).unwrap();
    assert_eq!(text, "<s>|</s>|P|False");
}

#[test]
fn blocks_are_trimmed_as_transformers_trims_them() {
    assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc\n").unwrap(), "a\nb\nc");
}

#[test]
fn names_of_python_and_transformers_are_there() {
    let source = "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ x is defined }} \
        {{ 'a' is sequence }} {{ ' x '.strip() }} {{ 'a,b'.split(',')[-1] }} {{ {'k': 1}.items() | list }} \
        {% for m in messages %}{% if loop.first %}{% continue %}{% endif %}no{% endfor %}{{ '<' ~ none ~ true }}";
    assert_eq!(render(source).unwrap(), "True True True False True x b [('k', 1)] <NoneTrue");
}

#[test]
fn generation_tags_change_nothing() {
    let source = "{{ 'a' }} {%- generation -%} b {{ 'c' }} {%+ endgeneration %}\nd {{ '{%' }}{% if 1 %}e{% endif %}";
    assert_eq!(render(source).unwrap(), "ab c d {%e");
    assert_eq!(without_generation_tags("x {% y"), "x {% y");
    assert_eq!(without_generation_tags("{%}{% generation %}"), "{%}{% if true %}");
}

#[test]
fn the_clock_is_local_and_formatted_as_in_python() {
    assert_eq!(render("{{ strftime_now('%Y') }}").unwrap(), jiff::ZonedDateTime::now().year().to_string());
    assert!(refused("{{ strftime_now('%') }}").starts_with("chat template: line 1: invalid operation: strftime_now: "));
}

#[test]
fn the_last_message_is_continued() {
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " It was "}]);
    let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
    let keeps = template("{% for m in messages %}<{{ m.content }}>{% endfor %}");
    assert_eq!(keeps.render(&messages, &options).unwrap(), "<Hi>< It was ");
    let trims = template("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}");
    assert_eq!(trims.render(&messages, &options).unwrap(), "<Hi><It was");

    let error = template("{{ messages[0].content }}").render(&messages, &options).unwrap_err();
    let why = "leaves the last message out, so that it cannot be continued; ask for a new one instead";
    assert_eq!(error.to_string(), format!("chat template: {why}"));
    let both = RenderOptions { add_generation_prompt: true, ..options };
    let error = keeps.render(&messages, &both).unwrap_err();
    assert_eq!(error.to_string(), "continue_final_message: excludes add_generation_prompt; choose one of the two");
}

#[test]
fn more_variables_can_be_given() {
    let mut options = RenderOptions { date: Some("1 Jan 2000".into()), ..RenderOptions::default() };
    options.extra.insert("thinking".into(), json!({"b": 1, "a": null}));
    options.extra.insert("documents".into(), json!([]));
    let template = template("{{ date_string }} {{ thinking | tojson }} {{ documents }}");
    let messages = json!([{"role": "user"}]);
    assert_eq!(template.render(&messages, &options).unwrap(), r#"1 Jan 2000 {"b": 1, "a": null} []"#);
    options.extra.insert("messages".into(), json!([]));
    assert_eq!(
        template.render(&messages, &options).unwrap_err().to_string(),
        "chat_template_kwargs: messages cannot be set here; use the request's own field"
    );
}

#[test]
fn damaged_files_are_refused() {
    let config = ChatTemplate::from_files(Some(b"[]"), None).unwrap_err().to_string();
    assert_eq!(
        config,
        "tokenizer_config.json: not a JSON object (invalid type: sequence, expected a map at line 1 column 0); \
         download the file again"
    );
    let jinja = ChatTemplate::from_files(None, Some(b"\xff")).unwrap_err().to_string();
    assert_eq!(jinja, "chat_template.jinja: not UTF-8; save it as UTF-8");
    assert_eq!(
        config_refused(json!({"chat_template": 3})),
        "tokenizer_config.json: chat_template is a number; give a string or a list of {name, template}"
    );
    assert_eq!(
        config_refused(json!({"chat_template": [{"name": "default"}]})),
        "tokenizer_config.json: chat_template[0] must have a string name and template; correct it"
    );
    let map = template("").with_special_tokens_map(b"").unwrap_err().to_string();
    assert_eq!(
        map,
        "special_tokens_map.json: not a JSON object (EOF while parsing a value at line 1 column 0); \
         download the file again"
    );
}

#[test]
fn templates_that_cannot_be_used_are_refused() {
    let error = ChatTemplate::from_files(None, Some(b"a\n{% if %}")).unwrap_err().to_string();
    assert_eq!(
        error,
        "chat template: line 2: syntax error: unexpected end of block; correct it or use another template"
    );
    let config = json!({"chat_template": [{"name": "rag", "template": ""}]});
    let rag = ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).unwrap().unwrap();
    let error = rag.render(&json!([{"role": "user"}]), &RenderOptions::default()).unwrap_err().to_string();
    assert_eq!(error, "chat template: none is named default; add one to tokenizer_config.json");
    assert_eq!(
        refused("\n{{ nothing.at_all }}"),
        "chat template: line 2: undefined value; correct it or use another template"
    );
}

#[test]
fn what_a_template_raises_is_the_error() {
    assert_eq!(
        refused("{{ raise_exception('roles must\nalternate') }}"),
        "chat template: refuses the messages: roles must alternate"
    );
    assert_eq!(
        refused("{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}"),
        "chat template: refuses the messages: deep"
    );
}

#[test]
fn tools_must_be_a_list() {
    let options = RenderOptions { tools: Some(json!({})), ..RenderOptions::default() };
    let error = template("").render(&json!([{"role": "user"}]), &options).unwrap_err();
    assert_eq!(error.to_string(), "tools: is an object; give an array of functions");
}

#[test]
fn hostile_templates_end() {
    let too_much = "chat template: takes more than 2000000 steps; send fewer messages or use another template";
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let doubling =
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    for source in [
        loops,
        doubling,
        "{{ 'x' * 99999999999 }}",
        "{{ range(99999) | map('string') | join('x' * 99999) }}",
        "{% set l = 'x' * 9999999 %}{% for i in range(99999) %}{{ l }}{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in l %}{{ l | tojson }}{% endfor %}",
    ] {
        assert_eq!(refused(source), too_much, "{source}");
    }
    for source in [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'default' %}",
        "{% for a in [[[]]] recursive %}{{ loop([[]]) }}{% endfor %}",
        "{{ range(999999999999) | list }}",
    ] {
        let error = refused(source);
        assert!(error.starts_with("chat template: line 1: "), "{source}: {error}");
    }
}

#[test]
fn a_value_nested_without_end_does_not_overflow_the_stack() {
    let levels = format!("{}ns.x{}", "[".repeat(40), "]".repeat(40));
    let set = format!("{{% set ns.x = {levels} %}}");
    let nest = |rows: usize| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range({rows}) %}}{{% for j in range(99) %}}{set}{{% endfor %}}\
             {{% endfor %}}"
        )
    };
    let too_much = "chat template: takes more than 2000000 steps; send fewer messages or use another template";
    assert_eq!(refused(&nest(9999)), too_much);
    assert_eq!(render(&nest(9)).unwrap(), "");
    let deep = "chat template: line 1: invalid operation: a value has more than 128 levels; \
        correct it or use another template";
    assert_eq!(refused(&(nest(9) + "{{ ns.x }}")), deep);
    assert_eq!(refused("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}"), deep);
}

#[test]
fn a_value_that_repeats_itself_is_paid_for() {
    let twice = "{% set x = [x, x] %}".repeat(60);
    let too_much = "chat template: takes more than 2000000 steps; send fewer messages or use another template";
    assert_eq!(refused(&(twice.clone() + "{{ x }}")), too_much);
    assert_eq!(refused(&("{% set x = 1 %}".to_string() + &twice + "{{ x | tojson }}")), too_much);
}
