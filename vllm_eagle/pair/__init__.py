"""The pair of models that ships with the project: a small Llama and an EAGLE-1 head for it. See README.md here."""

from pathlib import Path

TARGET = Path(__file__).with_name("target")
HEAD = Path(__file__).with_name("head")
