"""Problems, their split, V4's chat layout and the tokenizer. Importing this loads no heavy library."""

from posttrain.data.problems import DomainData, Problem, load_domain, load_domains

__all__ = ["DomainData", "Problem", "load_domain", "load_domains"]
