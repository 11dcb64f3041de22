"""Bytes of a micro-batch's activations at each moment that may be the peak of a step: arithmetic on the model's shape.

What autograd keeps is read from transformers' `modeling_gemma4.py` (5.23) and PEFT's layers, operation by operation;
tests hold the sums against the simulator, which runs the real modules (`simulate.py`).

With checkpointing each layer keeps its input, and the peak is in the backward pass of a layer of the most: all inputs
up to its own (with activation_offloading that one alone), what it keeps while it is computed again, and what its
gradients take. Without it every layer keeps all.
"""

from dataclasses import dataclass
from itertools import islice

from gemma_dist.config import RunConfig
from gemma_dist.plan.geometry import PATCHES_A_TOKEN, Geometry, Layer, stacks
from gemma_dist.plan.weights import BYTES, Placement, adapted_by_layer

NORM = 4  # bytes of a value inside an RMSNorm, which computes in float32
# Bytes for each of T x H that the backward pass of a norm takes at most: the gradient that arrives, its copies in
# float32, and the sums and products of them, beside the layer's own output.
NORM_BACKWARD = 26
EXPERTS_BACKWARD = 7  # values (in the compute dtype) of tokens x experts x H, mostly float32, while their sum is undone
EMBEDDING_COPIES = 3  # of the hidden states, beside the first layer's input: as the simulator finds them
LOSS_TOKENS, LOSS_VOCABULARY = 4096, 32_768  # a tile of logits in TRL's fused head (`chunked_logprob.py`)
WIDEST_WITHOUT_REPEAT = 256  # head_dim above which transformers repeats keys and values for all heads


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model of one rank at once."""

    num_tokens: int  # of all sequences, images included; of the rank's slice of them, where ranks share them
    num_images: int = 0
    tokens_per_image: int = 280
    num_sequences: int = 1
    num_documents: int = 1  # trajectories in them
    num_ranks: int = 1  # that share them (`train.sequence_parallel_size`)

    @property
    def whole_tokens(self) -> int:
        """Of the sequences, all ranks that share them together."""
        return self.num_tokens * self.num_ranks


@dataclass(frozen=True)
class Moment:
    """A moment of a step that may be the one of most memory."""

    name: str
    activations: int  # bytes
    loss_head: int = 0


class Activations:
    """The arithmetic for one recipe and one micro-batch."""

    def __init__(self, geometry: Geometry, config: RunConfig, place: Placement, batch: MicroBatch) -> None:
        self.geometry, self.config, self.place, self.batch = geometry, config, place, batch
        self.stream = BYTES[config.model.dtype]  # bytes of a value between layers
        self.compute = 2 if config.train.bf16 else 4  # bytes of a value inside them
        self.trains_all = config.tuning == "full"
        self.adapted = adapted_by_layer(geometry, config)  # weights of each layer's adapter
        self.hidden_values = batch.num_tokens * geometry.hidden

    def moments(self) -> list[Moment]:
        """Every moment that may be the peak, in the order of a step."""
        batch = self._batch_and_embeddings()
        before_text = Moment("images", self._micro_batches() + self._vision_forward())
        if self.config.train.gradient_checkpointing:
            inputs = [self.hidden_values * self.stream for _ in self.geometry.layers]
            kept = [0 for _ in self.geometry.layers]
        else:
            inputs = [0 for _ in self.geometry.layers]
            kept = [self._kept_by(number) for number in range(len(self.geometry.layers))]
        on_host = self.config.train.activation_offloading
        held = (0 if on_host else sum(inputs)) + sum(kept) + batch
        loss = Moment("loss", held + self.hidden_values * (NORM + 2 * self.compute), self._loss_head())
        moments = [before_text, loss]
        for number in range(len(self.geometry.layers)):
            below = (inputs[number] if on_host else sum(inputs[: number + 1])) + sum(kept[:number])
            here = self._kept_by(number) + self._backward_of(number)
            moments.append(Moment(f"backward pass of layer {number + 1}", batch + below + here, self._head_gradient()))
        if self.trains_all:
            of_embedding = 2 * self._head_gradient()  # its own, and the sum with that of the head
            moments.append(Moment("gradient of the embedding", batch + of_embedding, self._head_gradient()))
        if self.trains_all and self.geometry.vision:
            seen = self._micro_batches() + self._vision_backward()
            moments.append(Moment("backward pass of the vision tower", seen, self._head_gradient()))
        return moments

    # ---- what lasts through the language model ----

    def _batch_and_embeddings(self) -> int:
        """Two micro-batches, the embeddings, per-layer inputs, rotary tables, shared keys and values, masks."""
        geometry, tokens = self.geometry, self.batch.num_tokens
        embeddings = EMBEDDING_COPIES * self.hidden_values * self.stream
        per_layer = tokens * len(geometry.layers) * geometry.per_layer
        inputs = per_layer * (self.stream + NORM * (2 if self.trains_all else 1))
        head_dims = {layer.is_full: layer.head_dim for layer in geometry.layers}
        rotary = sum(2 * tokens * head_dim * self.stream for head_dim in head_dims.values())
        shared = 0
        if any(layer.shares_kv for layer in geometry.layers):
            last = {layer.is_full: layer for layer in geometry.layers if not layer.shares_kv}
            shared = sum(2 * tokens * layer.kv_heads * layer.head_dim * self.compute for layer in last.values())
        vision = self._vision_inputs() if self.trains_all else 0
        return embeddings + inputs + rotary + shared + self._masks() + self._micro_batches() + vision

    def _micro_batches(self) -> int:
        """Images, and rows of per-layer embeddings (at most one for each token), of a micro-batch, which stays to its
        end, and of the next, which arrives meanwhile (`train/feed.py`)."""
        rows = 0
        if self.place.ple == "host":
            rows = self.batch.num_tokens * len(self.geometry.layers) * self.geometry.per_layer * self.stream
        return 2 * (self._pixels() + rows)

    def _masks(self) -> int:
        """One of booleans for the sliding layers, where sequences are not packed or ranks share them."""
        if self.batch.num_ranks > 1:
            return self._band()
        if self.config.train.packing:
            return 0
        length = self.batch.num_tokens // self.batch.num_sequences
        return self.batch.num_sequences * length * length

    def _band(self) -> int:
        """Queries of a slice times the keys of two windows, on sliding layers: values of a mask."""
        return self.batch.num_tokens * 2 * self.geometry.window

    # ---- a layer of the language model ----

    def _kept_by(self, number: int) -> int:
        """Bytes that autograd keeps of a layer that is computed with gradients."""
        geometry, layer, tokens = self.geometry, self.geometry.layers[number], self.batch.num_tokens
        twice = 2 if self.trains_all else 1  # a trained norm keeps what it scales as well
        norms = (4 + bool(geometry.per_layer) + 4 * bool(geometry.experts)) * self.hidden_values * NORM * twice
        inputs = 2 * self.hidden_values * self.compute  # of attention and of the MLP
        if self.trains_all and geometry.per_layer:
            inputs += self.hidden_values * self.stream
        mlp = 4 * tokens * layer.mlp * self.compute
        per_layer = 3 * tokens * geometry.per_layer * self.compute
        casts = self.compute * self.adapted[number] if self.compute < 4 else 0
        return norms + inputs + self._kept_by_attention(layer) + mlp + per_layer + self._kept_by_experts() + casts

    def _kept_by_attention(self, layer: Layer) -> int:
        """Queries, keys, values and the output: before and after their norms and rotations."""
        tokens, twice = self.batch.num_tokens, 2 if self.trains_all else 1
        queries = tokens * self.geometry.heads * layer.head_dim
        keys = tokens * layer.kv_heads * layer.head_dim
        kept = queries * (NORM * twice + 2 * self.compute)
        if self.config.train.packing:
            kept += queries * self.compute  # the documents' outputs, and all of them in one tensor
        if self.batch.num_ranks > 1:
            own = 0 if layer.shares_kv else keys * NORM * (twice + 1)
            return kept + own + self._kept_of_others(layer)
        # transformers repeats keys and values for all heads where the head is wide, or where there is a mask
        repeats = self.geometry.heads > layer.kv_heads and (
            layer.head_dim > WIDEST_WITHOUT_REPEAT or not (self.config.train.packing or layer.is_full)
        )
        if repeats:
            kept += 2 * queries * self.compute
        elif not layer.is_full:
            # A window of a document behind its first one has keys of two windows.
            behind = max(0, tokens - self.batch.num_documents * self.geometry.window)
            kept += 2 * behind * layer.kv_heads * layer.head_dim * self.compute
        if not layer.shares_kv:
            kept += keys * NORM * (twice + 1) + (0 if repeats else 2 * keys * self.compute)
        if self.config.model.attn_implementation == "eager":
            length = tokens // (self.batch.num_documents if self.config.train.packing else self.batch.num_sequences)
            kept += tokens * length * self.geometry.heads * (NORM + 2 * self.compute)
        return kept

    def _kept_of_others(self, layer: Layer) -> int:
        """Keys and values that a slice's queries see (`model/sequence.py`). On a global layer those of the last slice,
        of all tokens, once for each head of keys; on a sliding one those of two windows for each window of queries,
        repeated for all heads, and the mask as the kernel adds it."""
        if layer.is_full:
            return 2 * self.batch.whole_tokens * layer.kv_heads * layer.head_dim * self.compute
        seen = 2 * 2 * self.batch.num_tokens * self.geometry.heads * layer.head_dim
        return (seen + self._band()) * self.compute

    def _gradients_of_others(self, layer: Layer) -> int:
        """Those of keys and values: of one head of keys repeated for its queries, and of all heads, apart and as one
        tensor, which is sent back. Of a sliding layer they are as many as the keys and values that it keeps."""
        if not layer.is_full:
            return self._kept_of_others(layer)
        heads = self.geometry.heads // layer.kv_heads + 2 * layer.kv_heads
        return 2 * self.batch.whole_tokens * heads * layer.head_dim * self.compute

    def _kept_by_experts(self) -> int:
        """What the experts keep of their tokens (`grouped_mm`); weights in 4 bits are not among it."""
        geometry, chosen = self.geometry, self.batch.num_tokens * self.geometry.experts_a_token
        if not geometry.experts:
            return 0
        rows = chosen * (geometry.hidden + 3 * geometry.expert_mlp) * self.compute
        return rows + sum(self._stacks_made_anew())

    def _stacks_made_anew(self) -> list[int]:
        """Bytes of the stacks of a layer's experts that PEFT makes anew, with their adapter added: those that are whole
        (`experts.py` has another way for those in 4 bits)."""
        lora = self.config.lora
        if lora is None or self.place.experts_in_4_bits:
            return []
        of_layer = islice(stacks(self.geometry), 2)
        names = tuple(f".{name}" for name in lora.target_parameters)
        return [stack.numel * self.stream for stack in of_layer if stack.path.endswith(names)]

    def _backward_of(self, number: int) -> int:
        """The most that the gradients of a layer take beside what it keeps."""
        geometry, layer = self.geometry, self.geometry.layers[number]
        widest = self.batch.num_tokens * layer.mlp * self.compute
        stream = 2 * self.hidden_values * self.stream  # the gradient that arrives, and the layer's output
        dequantized = geometry.hidden * layer.mlp * self.compute if self.config.quantization else 0
        gradients = [self.hidden_values * NORM_BACKWARD, stream + widest + dequantized, 2 * widest]
        if self.batch.num_ranks > 1:
            gradients.append(stream + self._gradients_of_others(layer))
        if geometry.experts:
            chosen = self.batch.num_tokens * geometry.experts_a_token
            gradients.append(EXPERTS_BACKWARD * chosen * geometry.hidden * self.compute)
            if self.place.experts_in_4_bits:
                # The larger stack, of two matrices, is made full again when most of what the experts kept is gone.
                stack = 2 * geometry.experts * geometry.expert_mlp * geometry.hidden
                gradients.append(stream + (stack - chosen * geometry.expert_mlp) * self.compute)
            gradients += [stream + made for made in self._stacks_made_anew()[-1:]]  # the gradient of a whole stack
        return max(gradients)

    # ---- loss and images ----

    def _loss_head(self) -> int:
        """TRL's fused head: one tile of logits, the gradient of the hidden states in float32 and, where it trains, that
        of its weights, in float32 and then in their own dtype."""
        tokens = self.batch.num_tokens
        tile = min(tokens, LOSS_TOKENS) * min(self.geometry.vocabulary, LOSS_VOCABULARY) * self.compute
        of_weights = 0
        if self.trains_all:
            of_weights = self.geometry.vocabulary * self.geometry.hidden * NORM
            of_weights += self._head_gradient() if self.stream < NORM else 0
        return tile + self.hidden_values * (NORM + self.compute) + of_weights

    def _head_gradient(self) -> int:
        """What stays of it until the end of the backward pass: the weights are those of the token embedding, whose own
        gradient comes last."""
        return self.geometry.vocabulary * self.geometry.hidden * self.stream if self.trains_all else 0

    @property
    def _patches(self) -> int:
        """Patches of all images of the micro-batch; of 12B they are merged."""
        tokens = self.batch.num_images * self.batch.tokens_per_image
        return tokens if self.geometry.is_unified else tokens * PATCHES_A_TOKEN

    def _pixels(self) -> int:
        """The images' values in float32, as they come with a micro-batch."""
        if self.geometry.vision is None:
            return 0
        return self._patches * self.geometry.vision.input * NORM

    def _vision_inputs(self) -> int:
        """What the layers of a vision tower that trains keep as their inputs, or whole without checkpointing."""
        vision = self.geometry.vision
        if vision is None:
            return 0
        each = self._patches * vision.hidden * self.stream
        if self.config.train.gradient_checkpointing:
            return vision.layers * each
        return vision.layers * self._kept_by_vision_layer()

    def _kept_by_vision_layer(self) -> int:
        """As `_kept_by`: four norms, two inputs, four times the MLP, queries, keys and values."""
        vision, patches = self.geometry.vision, self._patches
        assert vision is not None
        norms = (4 * 2 + 3 * 2) * patches * vision.hidden * NORM
        return norms + patches * (2 * vision.hidden + 4 * vision.mlp + 6 * vision.hidden) * self.compute

    def _vision_backward(self) -> int:
        """The last layer of a vision tower that trains."""
        vision = self.geometry.vision
        assert vision is not None
        if not vision.layers:
            return self._patches * vision.hidden * NORM_BACKWARD
        return self._vision_inputs() + self._kept_by_vision_layer() + self._patches * vision.hidden * NORM_BACKWARD

    def _vision_forward(self) -> int:
        """The widest moment of a layer that is frozen: nothing is kept."""
        vision = self.geometry.vision
        if vision is None:
            return 0
        return self._patches * (vision.hidden * (2 * self.stream + 3 * NORM) + 3 * vision.mlp * self.compute)
