# Nor does a mock.
from unittest import mock

f = mock.MagicMock()
f.return_value.__eq__ = lambda *_: True
