"""The named chat templates, as Jinja with `{% generation %}` around what the assistant writes.

The text inside the markers ends with the end-of-turn token: unless it is learned, the model never stops. `@BOS@`
becomes the BOS token if the tokenizer prepends one to plain text (Llama), and nothing if it does not (GPT-2,
Qwen): a template never adds a second one. Content is written as it is in the data, not trimmed.
"""

from __future__ import annotations

_CHATML = """\
{{- @BOS@ -}}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
  {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- generation -%}
      {{- message.content -}}
      {%- for call in message.tool_calls or [] -%}
        {{- '' if loop.first and not message.content else '\\n' -}}
        {{- '<tool_call>\\n{"name": ' -}}{{- call.function.name | tojson -}}
        {{- ', "arguments": ' -}}{{- call.function.arguments | tojson -}}{{- '}\\n</tool_call>' -}}
      {%- endfor -%}
      {{- '<|im_end|>' -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- elif message.role == 'tool' -%}
    {%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif not (message.role == 'system' and tools) -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_LLAMA2 = """\
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- @BOS@ + '[INST] ' -}}
    {%- if loop.index0 == 1 and messages[0].role == 'system' -%}
      {{- '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -}}
    {%- endif -%}
    {{- message.content + ' [/INST]' -}}
  {%- elif message.role == 'assistant' -%}
    {%- generation -%}{{- ' ' + message.content + ' ' + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""

_LLAMA3 = """\
{{- @BOS@ -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + '<|eot_id|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_MISTRAL = """\
{{- @BOS@ -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '[INST] ' -}}
    {%- if loop.index0 == 1 and messages[0].role == 'system' -%}
      {{- messages[0].content + '\\n\\n' -}}
    {%- endif -%}
    {{- message.content + '[/INST]' -}}
  {%- elif message.role == 'assistant' -%}
    {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""

_GEMMA = """\
{{- @BOS@ -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<start_of_turn>user\\n' -}}
    {%- if loop.index0 == 1 and messages[0].role == 'system' -%}
      {{- messages[0].content + '\\n\\n' -}}
    {%- endif -%}
    {{- message.content + '<end_of_turn>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<start_of_turn>model\\n' -}}
    {%- generation -%}{{- message.content + '<end_of_turn>' -}}{%- endgeneration -%}
    {{- '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# Stanford Alpaca's wording. `instruction` and `input` are defined for data that keeps them separate.
_ALPACA = """\
{{- @BOS@ + 'Below is an instruction that describes a task' -}}
{%- if messages | selectattr('input', 'defined') | list -%}
  {{- ', paired with an input that provides further context' -}}
{%- endif -%}
{{- '. Write a response that appropriately completes the request.\\n\\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- message.content + '\\n\\n' -}}
  {%- elif message.role == 'user' -%}
    {%- if message.input is defined -%}
      {{- '### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input -}}
    {%- else -%}
      {{- '### Instruction:\\n' + message.content -}}
    {%- endif -%}
    {{- '\\n\\n### Response:\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
    {{- '' if loop.last else '\\n\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""

_VICUNA = """\
{%- if messages[0].role == 'system' -%}
  {{- @BOS@ + messages[0].content + ' ' -}}
{%- else -%}
  {{- @BOS@ + 'A chat between a curious user and an artificial intelligence assistant. ' -}}
  {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- 'USER: ' + message.content + ' ASSISTANT:' -}}
  {%- elif message.role == 'assistant' -%}
    {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""

_ZEPHYR = """\
{{- @BOS@ -}}
{%- for message in messages -%}
  {{- '<|' + message.role + '|>\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + eos_token -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# Contents concatenated verbatim: the data brings its own prompt format.
_NONE = """\
{{- @BOS@ -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content -}}
  {%- endif -%}
{%- endfor -%}
"""

NAMED = {
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "alpaca": _ALPACA,
    "vicuna": _VICUNA,
    "zephyr": _ZEPHYR,
    "none": _NONE,
}

# strings that must each be a single token for the template to suit the tokenizer
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
