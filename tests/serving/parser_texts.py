"""Answers in the formats of the models that vLLM has parsers for: calls of two tools, and reasoning."""

# ruff: noqa: RUF001 - the models' markers have such characters

ADD = '{"name": "add", "arguments": {"a": 3, "b": 14}}'
SAY = '{"name": "say", "arguments": {"text": "x < y, \\"so\\""}}'
ARGUMENTS = '{"a": 3, "b": 14}'
_QWEN = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n14\n</parameter>\n</function>\n</tool_call>"
_GLM = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n<arg_key>b</arg_key>\n<arg_value>14</arg_value>\n</tool_call>"
)
_INVOKE = '<invoke name="add">\n<parameter name="a">3</parameter>\n<parameter name="b">14</parameter>\n</invoke>'
_DSML = (
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">14</｜DSML｜parameter>\n</｜DSML｜invoke>'
)
_STEP = '<steptml:invoke name="add"><steptml:parameter name="a">3</steptml:parameter></steptml:invoke>'

CALLS = {
    "JSON in tags": f"I add.\n<tool_call>\n{ADD}\n</tool_call>\nDone.",
    "two of them": f"<tool_call>{ADD}</tool_call>\n<tool_call>{SAY}</tool_call>",
    "not finished": f"<tool_call>\n{ADD[:-4]}",
    "functions and parameters": f"I add.\n{_QWEN}\nDone.",
    "two functions": f"{_QWEN}\n{_QWEN.replace('add', 'say').replace('=a', '=text')}",
    "keys and values": f"I add.{_GLM}{_GLM}Done.",
    "an array in tags": f"<tool_calls>[{ADD}, {SAY}]</tool_calls> Done.",
    "tags in tags": "<tool_calls><tool_call>add<tool_sep><arg_key>a</arg_key><arg_value>3</arg_value></tool_call></tool_calls>.",
    "a token and an array": f"I add.[TOOL_CALLS][{ADD}, {SAY}]",
    "a token and a name": f"[TOOL_CALLS]add[ARGS]{ARGUMENTS}",
    "a token and a name, older": f"[TOOL_CALLS]add{ARGUMENTS}[TOOL_CALLS]say{{}}",
    "JSON alone": '{"name": "add", "parameters": {"a": 3, "b": 14}}; {"name": "say", "parameters": {"text": "hi"}}',
    "a Python tag": '<|python_tag|>{"name": "add", "parameters": {"a": 3, "b": 14}}',
    "Python": "[add(a=3, b=14), say(text='hi')]",
    "Python between tokens": "Yes.<|tool_call_start|>[add(a=3, b=14), say(text='hi')]<|tool_call_end|>Done.",
    "Python between tags": "<function_calls>add(a=3, b=14)\nsay(text='hi')</function_calls>",
    "a token and JSON": f"<|tool_call|>[{ADD}, {SAY}]",
    "function_call": f"<function_call> {ADD}<function_call> {SAY}",
    "an array of functools": f"functools[{ADD}]",
    "a call with braces": "<start_function_call>call:add{a:3,b:14}<end_function_call>",
    "a call between tokens": '<|tool_call>call:add{a:3,b:14}<tool_call|><|tool_call>call:say{text:<|"|>hi<|"|>}<tool_call|>',
    "calls with fenced JSON": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "calls with JSON": f"So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>say<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DSML": f"I add.\n\n<｜DSML｜function_calls>\n{_DSML}\n</｜DSML｜function_calls>",
    "DSML, newer": f"I add.\n\n<｜DSML｜tool_calls>\n{_DSML}\n</｜DSML｜tool_calls>Done.",
    "invocations": f"I add.\n<minimax:tool_call>\n{_INVOKE}\n</minimax:tool_call>\nDone.",
    "invocations, other tags": f"<dots_function_call>{_INVOKE}</dots_function_call>",
    "a section of calls": "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.say:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "an action": 'I add.<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 3, "b": 14}}<|action_end|>',
    "JSON in long tags": f"Yes <longcat_tool_call>{ADD}</longcat_tool_call>",
    "seed": f"<seed:tool_call>\n{_QWEN[12:-13]}\n</seed:tool_call>Done.",
    "a prefix and a suffix": '<|tools_prefix|>[{"add": {"a": 3, "b": 14}}, {"say": {"text": "hi"}}]<|tools_suffix|>',
    "a function token": f"Yes.<|message_sep|>\n\nfunction call<|role_sep|>\n{ADD}",
    "steps": f"<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>{_STEP}<｜tool_call_end｜><｜tool_calls_end｜>.",
    "attributes": '<function name="add"><param name="a">3</param><param name="b">14</param></function>Done.',
}
REASONING = {
    "think": "<think>Tom has 3.\nHe buys 4.</think>\n\nHe has 7.",
    "think, not begun": "Tom has 3.\n</think>He has 7.",
    "think, not ended": "<think>Tom has 3.\nHe buys",
    "think, late": "Well. <think>Tom has 3.</think> He has 7.",
    "thoughts in words": "Here is my thought process: Tom buys four boxes. Here is my response: He has 36 pencils.",
    "an answer in tags": "<think>\nTom has 3.\n</think>\n<answer>\nHe has 7.\n</answer>",
    "a response in tags": "Tom has 3.\n</think>\n\n<response>\nHe has 7.\n</response>\n",
    "think in brackets": "[THINK]Tom has 3.[/THINK]He has 7.",
    "think, seed": "<seed:think>Tom has 3.</seed:think>He has 7.",
    "think in diamonds": "◁think▷Tom has 3.◁/think▷He has 7.",
    "a channel": "<|channel>thought\nTom has 3.<channel|>He has 7.",
    "think and a call": f"<think>I add.</think>\n\n{_QWEN}\nDone.",
    "think and a call of JSON": f"<think>I add.</think>\n\n<tool_call>\n{ADD}\n</tool_call>\nDone.",
    "think and a call of keys": f"<think>I add.</think>Yes.{_GLM}",
    "brackets and a call": f"[THINK]I add.[/THINK]Yes.[TOOL_CALLS]add[ARGS]{ARGUMENTS}",
}
TEXTS = CALLS | REASONING
