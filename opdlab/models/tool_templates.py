"""A chat template with tools, for models of the ChatML form whose own template has none.

    Policy.load("HuggingFaceTB/SmolLM2-135M-Instruct", chat_template=CHATML_WITH_TOOLS)

Prefer a model's own template where it reads tools: the model was trained on it.
"""

CHATML_WITH_TOOLS = (
    "{%- set has_system = messages[0]['role'] == 'system' %}"
    "{%- if tools or has_system %}{{- '<|im_start|>system\n' }}"
    "{{- messages[0]['content'] if has_system else 'You may call tools.' }}"
    "{%- if tools %}{{ '\n\nTools, one JSON schema per line:\n' }}"
    "{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}"
    """{{- 'To call one, write <tool_call>{"name": "…", "arguments": {…}}</tool_call>.' }}"""
    "{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (loop.first and has_system) %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{%- if message['content'] or not loop.first %}{{ '\n' }}{%- endif %}"
    """{{- '<tool_call>{"name": "' + call['function']['name'] + '", "arguments": ' }}"""
    "{{- call['function']['arguments'] | tojson }}{{ '}</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
