"""Configs of other trainers: Axolotl, LLaMA-Factory, TRL (and Unsloth, PEFT), torchtune.

    answers    what a key of theirs means here: values to set, nothing to set, or nothing that means it
    table      every key that is known; `answer` for error messages, `lookup` for `qlora-dist import`
    left_out   the keys of that table for which nothing is set
    sources    their data sources
    trainers   whose config it is, and what its trainer takes for keys that are absent
    translate  a whole config: every key is translated, needs nothing here, or is listed as not translated

Names, meanings and defaults are those of the trainers' public documentation.
"""
