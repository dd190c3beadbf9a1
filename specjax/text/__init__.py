"""Tokens as text and text as tokens: vocabularies, chat templates, text streams."""

from specjax.text.chat import ChatTemplate as ChatTemplate
from specjax.text.chat import load_chat_template as load_chat_template
from specjax.text.stream import TextStream as TextStream
from specjax.text.tokenizer import load_tokenizer as load_tokenizer
from specjax.text.vocabulary import VocabularyMap as VocabularyMap
from specjax.text.vocabulary import match_vocabularies as match_vocabularies
from specjax.text.vocabulary import token_bytes as token_bytes
