"""The checkpoint formats of encoder-decoders: Hugging Face's T5 and mT5, T5X's T5."""

from common.infer.texts import TextConventions
from common.weights.formats import Formats
from t5like.convert import hugging_face, t5x


def _special_ids(text: TextConventions) -> dict[str, int | None]:
    # Transformers' T5 pads decoder inputs, shifted right, with the pad token: it has to be the start token.
    return {"bos_token_id": text.bos_id, "decoder_start_token_id": text.start_id, "pad_token_id": text.start_id}


FORMATS = Formats(
    hugging_face=(hugging_face.T5, hugging_face.MT5),
    t5x=t5x.FORMAT,
    write_config=hugging_face.write_config,
    special_ids=_special_ids,
)
