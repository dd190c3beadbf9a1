"""Training of targets and drafters: recipes, text, losses, and a loop that resumes exactly."""

from specjax.training.blocks import block_objective as block_objective
from specjax.training.corpus import OwnText as OwnText
from specjax.training.corpus import encode_files as encode_files
from specjax.training.data import END_OF_TEXT as END_OF_TEXT
from specjax.training.data import Windows as Windows
from specjax.training.data import encode_texts as encode_texts
from specjax.training.data import train_tokenizer as train_tokenizer
from specjax.training.loop import fit as fit
from specjax.training.loop import split_rows as split_rows
from specjax.training.objectives import head_objective as head_objective
from specjax.training.objectives import make_objective as make_objective
from specjax.training.objectives import medusa_objective as medusa_objective
from specjax.training.online import DraftState as DraftState
from specjax.training.online import DraftTrainer as DraftTrainer
from specjax.training.own_text import Document as Document
from specjax.training.own_text import Openings as Openings
from specjax.training.own_text import openings_of as openings_of
from specjax.training.own_text import write_documents as write_documents
from specjax.training.recipe import Recipe as Recipe
from specjax.training.recipe import Stage as Stage
from specjax.training.recipe import read_recipe as read_recipe
from specjax.training.sizes import KINDS as KINDS
from specjax.training.sizes import draft_recipe as draft_recipe
from specjax.training.trainees import Trainee as Trainee
from specjax.training.trainees import make_trainee as make_trainee
from specjax.training.trainees import with_targets_head as with_targets_head
