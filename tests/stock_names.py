"""Every name of transformers that the published files rely on, as data; tests/test_stock_names.py checks it.

A line is a path from a module, or from a tiny stock model, and behind it what the code hands over or reads:

    LlavaModel.forward(input_ids / labels **)   these arguments, before `/` by their place too; `**`: any other by name
    config.vision_config.patch_size             an attribute, here of what an attribute is
    vision_tower.vision_model?.encoder          `?`: where there is one; `a|b`: one of the two
    from_pretrained(*gguf_file)                 read by this name out of its `**kwargs`
    get_image_features(>pooler_output)          what it says it returns has this field
    encoder.layers[0], get_text_config()        an item, or what a call gives
    select_hidden_states @5.23                  needed from that version on (@-5.17: up to it), also behind an argument

What only some versions have under one name is a field of `Names`, filled with what stock_versions.py says.
"""

from __future__ import annotations

from dataclasses import dataclass

from vispruner.base_weights import HUB_OPTIONS
from vispruner.stock_versions import CACHE, VIDEO_LLAVA_IMAGES


@dataclass(frozen=True)
class Names:
    """What transformers has renamed: the KV cache, and Video-LLaVA's images."""

    cache: str = CACHE
    video_llava_images: str = VIDEO_LLAVA_IMAGES


HUB = " ".join(HUB_OPTIONS)

# The eager attention function is looked up by this name, beside the class of an encoder's attention.
EAGER = "eager_attention_forward(module query key value attention_mask / scaling)"
# What a tower of CLIP or SigLIP has.
TOWER = """
    model.{0}.forward(pixel_values **)
    model.{0}.vision_model?.embeddings
    model.{0}.vision_model?.encoder.layers[0].self_attn.config._attn_implementation
    model.{0}.vision_model?.encoder.layers[0].forward(hidden_states attention_mask **)
"""
PATCHES = """
    config.vision_config.model_type
    config.vision_config.image_size
    config.vision_config.patch_size
    config.vision_config.num_hidden_layers
    config.vision_config.num_register_tokens?
    config.vision_config.stage_names?
"""
FEATURE_CHOICE = """
    config.vision_feature_layer
    config.vision_feature_select_strategy
"""
# What an encoder of tiles with SigLIP layers and a connector has.
TILES = """
    config.scale_factor
    config.vision_config.patch_size
    model.image_seq_len
    model.dtype
    model.connector.scale_factor
    model.connector.pixel_shuffle(x scale_factor /)
    model.connector.forward
    model.vision_model.forward(pixel_values / patch_attention_mask **)
    model.vision_model.encoder.layers[0].self_attn.config._attn_implementation
    model.vision_model.encoder.layers[0].forward(hidden_states attention_mask **)
    image_token_id
    vocab_size
"""
GRIDS = """
    config.vision_config.patch_size
    config.vision_config.spatial_merge_size
    config.vision_config.temporal_patch_size
    model.rope_deltas
    model.visual.spatial_merge_size
    model.visual.blocks[0].attn.config._attn_implementation
    model.visual.blocks[0].forward(hidden_states / cu_seqlens position_embeddings **)
    model.visual.merger.forward
    model.visual.deepstack_merger_list?
    model.get_rope_index(input_ids / mm_token_type_ids image_grid_thw video_grid_thw attention_mask)
"""


def names_in_modules(names: Names) -> dict[str, str]:
    """Return what is looked up in each module of transformers."""
    cache, images = names.cache, names.video_llava_images
    forward = (
        f"input_ids attention_mask position_ids {cache} inputs_embeds labels logits_to_keep mm_encoder_outputs@5.18 **"
        f" >{cache}"
    )
    base = (
        f"input_ids attention_mask position_ids {cache} inputs_embeds mm_encoder_outputs@5.18 ** >last_hidden_state"
        f" >{cache} >hidden_states >attentions"
    )
    features = "** >pooler_output"
    hub = HUB.replace("proxies", "*proxies").replace("subfolder", "*subfolder")
    choice = "vision_feature_layer vision_feature_select_strategy"
    grids = "pixel_values pixel_values_videos image_grid_thw video_grid_thw mm_token_type_ids"

    return {
        "transformers": f"""
            AttentionInterface.register(key value /)
            AutoConfig.from_pretrained(pretrained_model_name_or_path / **)
            CLIPTextConfig.__init__(vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings
                projection_dim num_attention_heads hidden_act layer_norm_eps eos_token_id bos_token_id pad_token_id)
            CLIPTextModelWithProjection.__init__(config /)
            CLIPTextModelWithProjection.forward(input_ids attention_mask ** >text_embeds)
            Cache.get_seq_length
            GenerationConfig.from_model_config(model_config /)
            GenerationConfig.from_pretrained(pretrained_model_name / **)
            GenerationConfig().max_length
            GenerationConfig().max_new_tokens
            GenerationConfig().min_length
            GenerationConfig().min_new_tokens
            GenerationConfig().pad_token_id
            GenerationConfig().eos_token_id
            GenerationConfig().prefill_chunk_size
            GenerationConfig().prompt_lookup_num_tokens
            GenerationConfig().suppress_tokens
            GenerationConfig().use_cache
            GenerationMixin.generate(inputs generation_config / logits_processor stopping_criteria
                prefix_allowed_tokens_fn assistant_model streamer **)
            GenerationMixin._expand_inputs_for_generation(expand_size input_ids **)
            GenerationMixin._merge_criteria_processor_list(default_list custom_list /)
            GenerationMixin.prepare_inputs_for_generation(input_ids / **)
            PreTrainedConfig.__post_init__(**)
            PreTrainedConfig.from_dict(config_dict / ** *_commit_hash@-5.17)
            PreTrainedConfig.from_pretrained(pretrained_model_name_or_path / **)
            PreTrainedConfig.get_config_dict(pretrained_model_name_or_path / **)
            PreTrainedConfig.get_text_config
            PreTrainedConfig.to_dict
            PreTrainedModel.__init_subclass__
            PreTrainedModel._auto_class
            PreTrainedModel._from_config(config / **)
            PreTrainedModel._get_files_timestamps(working_dir /)
            PreTrainedModel.base_model
            PreTrainedModel.config_class
            PreTrainedModel.from_pretrained(pretrained_model_name_or_path / config ignore_mismatched_sizes {hub}
                *output_loading_info *adapter_kwargs *generation_config *gguf_file **)
            PreTrainedModel.get_input_embeddings
            PreTrainedModel.loss_function
            PreTrainedModel.post_init
            PreTrainedModel.save_pretrained(save_directory / **)
            PreTrainedTokenizerFast.__init__(*tokenizer_file)

            Gemma3Config Gemma3Config.__init__ Gemma3Model Gemma3Model.__init__(config /)
            Gemma3ForConditionalGeneration.__init__(config /)
            Gemma3ForConditionalGeneration.forward({forward} pixel_values token_type_ids)
            Gemma3Model.forward({base} pixel_values token_type_ids)
            Gemma3Model.get_image_features(pixel_values / {features})

            Idefics3Config.__init__ Idefics3Model.__init__(config /)
            Idefics3ForConditionalGeneration.__init__(config /)
            Idefics3ForConditionalGeneration.forward({forward} pixel_values pixel_attention_mask)
            Idefics3Model.forward({base} pixel_values pixel_attention_mask)
            Idefics3Model.get_image_features(pixel_values pixel_attention_mask / {features})

            InternVLConfig.__init__ InternVLModel.__init__(config /)
            InternVLForConditionalGeneration.__init__(config /)
            InternVLForConditionalGeneration.forward({forward} pixel_values image_sizes {choice})
            InternVLModel.forward({base} pixel_values {choice})
            InternVLModel.get_image_features(pixel_values / {choice} {features})
            InternVLModel.pixel_shuffle(vision_features scale_factor /)

            LlavaConfig.__init__ LlavaModel.__init__(config /)
            LlavaForConditionalGeneration.__init__(config /)
            LlavaForConditionalGeneration.forward({forward} pixel_values image_sizes {choice})
            LlavaModel.forward({base} pixel_values image_sizes {choice})
            LlavaModel.get_image_features(pixel_values / {choice} image_sizes@5.18 {features})
            LlavaModel.get_placeholder_mask(input_ids inputs_embeds image_features /)
            LlavaProcessor.__init__(image_processor patch_size image_token)
            LlavaProcessor._get_num_multimodal_tokens(image_sizes / **)
            LlavaProcessor.replace_image_token(image_inputs image_idx / **)

            LlavaNextConfig.__init__ LlavaNextModel.__init__(config /)
            LlavaNextForConditionalGeneration.__init__(config /)
            LlavaNextForConditionalGeneration.forward({forward} pixel_values image_sizes {choice})
            LlavaNextModel.forward({base} pixel_values image_sizes {choice})
            LlavaNextModel.get_image_features(pixel_values image_sizes / {choice} {features})
            LlavaNextModel.get_placeholder_mask(input_ids inputs_embeds image_features /)
            LlavaNextModel.pack_image_features(image_features image_sizes vision_feature_select_strategy /
                image_newline)
            LlavaNextProcessor.__init__(image_processor patch_size image_token)
            LlavaNextProcessor._get_num_multimodal_tokens(image_sizes / **)
            LlavaNextProcessor.replace_image_token(image_inputs image_idx / **)

            LlavaOnevisionConfig.__init__ LlavaOnevisionModel.__init__(config /)
            LlavaOnevisionForConditionalGeneration.__init__(config /)
            LlavaOnevisionForConditionalGeneration.forward({forward} pixel_values image_sizes pixel_values_videos
                vision_aspect_ratio batch_num_images {choice})
            LlavaOnevisionModel.forward({base} pixel_values image_sizes pixel_values_videos
                vision_aspect_ratio batch_num_images {choice})
            LlavaOnevisionModel.get_image_features(pixel_values image_sizes / batch_num_images {choice} {features})
            LlavaOnevisionModel.get_video_features(pixel_values_videos|pixel_values / {choice} {features})
            LlavaOnevisionModel.pack_image_features(image_features image_sizes / image_newline vision_aspect_ratio)
            LlavaOnevisionModel.apply_pooling(image_features /)

            PaliGemmaConfig.__init__ PaliGemmaModel.__init__(config /)
            PaliGemmaForConditionalGeneration.__init__(config /)
            PaliGemmaForConditionalGeneration.forward({forward} pixel_values token_type_ids)
            PaliGemmaForConditionalGeneration._update_model_kwargs_for_generation
            PaliGemmaModel.forward({base} pixel_values token_type_ids)
            PaliGemmaModel.get_image_features(pixel_values / {features})

            Qwen2VLConfig.__init__ Qwen2VLModel.__init__(config /)
            Qwen2VLForConditionalGeneration.__init__(config /)
            Qwen2VLForConditionalGeneration.forward({forward} {grids})
            Qwen2VLModel.forward({base} {grids})
            Qwen2VLModel.get_image_features(pixel_values image_grid_thw / {features})
            Qwen2VLModel.get_video_features(pixel_values_videos video_grid_thw / {features})

            Qwen2_5_VLConfig.__init__ Qwen2_5_VLModel.__init__(config /)
            Qwen2_5_VLForConditionalGeneration.__init__(config /)
            Qwen2_5_VLForConditionalGeneration.forward({forward} {grids} second_per_grid_ts)
            Qwen2_5_VLModel.forward({base} {grids} second_per_grid_ts)
            Qwen2_5_VLModel.get_image_features(pixel_values image_grid_thw / {features})
            Qwen2_5_VLModel.get_video_features(pixel_values_videos video_grid_thw / {features})
            Qwen2_5_VLModel.get_rope_index(second_per_grid_ts)

            Qwen3VLConfig.__init__ Qwen3VLModel.__init__(config /)
            Qwen3VLForConditionalGeneration.__init__(config /)
            Qwen3VLForConditionalGeneration.forward({forward} {grids})
            Qwen3VLModel.forward({base} {grids})
            Qwen3VLModel.get_image_features(pixel_values image_grid_thw / {features} >deepstack_features)
            Qwen3VLModel.get_video_features(pixel_values_videos video_grid_thw / {features})

            SmolVLMConfig.__init__ SmolVLMModel.__init__(config /)
            SmolVLMForConditionalGeneration.__init__(config /)
            SmolVLMForConditionalGeneration.forward({forward} pixel_values pixel_attention_mask)
            SmolVLMModel.forward({base} pixel_values pixel_attention_mask)
            SmolVLMModel.inputs_merger @-5.20
            SmolVLMModel.get_image_features(pixel_values pixel_attention_mask / {features})

            VideoLlavaConfig.__init__ VideoLlavaModel.__init__(config /)
            VideoLlavaForConditionalGeneration.__init__(config /)
            VideoLlavaForConditionalGeneration.forward({forward} {images} pixel_values_videos {choice})
            VideoLlavaModel.forward({base} {images} pixel_values_videos {choice})
            VideoLlavaModel.get_image_features({images} / {choice} {features})
            VideoLlavaModel.get_video_features(pixel_values_videos / vision_feature_layer {features})
        """,
        "transformers.conversion_mapping": """
            get_checkpoint_conversion_mapping(model_type /)
            register_checkpoint_conversion_mapping(model_type_or_class_name mapping / overwrite)
        """,
        "transformers.cache_utils": """
            DynamicCache().layers
            QuantizedLayer
        """,
        "transformers.dynamic_module_utils": "get_relative_import_files(module_file /)",
        "transformers.generation": "utils._slice_mm_encoder_output @5.23",
        "transformers.generation.utils": f"""
            GenerateDecoderOnlyOutput.sequences
            GenerateDecoderOnlyOutput.{cache}
            GenerateBeamDecoderOnlyOutput.sequences
            GenerateBeamDecoderOnlyOutput.{cache}
        """,
        "transformers.masking_utils": f"""
            create_causal_mask(config inputs_embeds attention_mask / {cache} layer_idx)
            create_sliding_window_causal_mask(config inputs_embeds attention_mask / {cache} layer_idx)
        """,
        "transformers.modeling_outputs": """
            BaseModelOutputWithPooling.last_hidden_state
            BaseModelOutputWithPooling.pooler_output
            BaseModelOutputWithPooling.hidden_states
            BaseModelOutputWithPooling.attentions
        """,
        "transformers.modeling_utils": """
            ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation default /)
            load_state_dict(checkpoint_file /)
        """,
        "transformers.models.auto.modeling_auto": """
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        """,
        "transformers.models.clip.modeling_clip": EAGER,
        "transformers.models.idefics3.modeling_idefics3": EAGER,
        "transformers.models.internvl.modeling_internvl": EAGER,
        "transformers.models.llava_next.modeling_llava_next": """
            get_anyres_image_grid_shape(image_size grid_pinpoints patch_size /)
        """,
        "transformers.models.llava_next.image_processing_pil_llava_next": """
            LlavaNextImageProcessorPil.crop_size
            LlavaNextImageProcessorPil.image_grid_pinpoints
        """,
        "transformers.models.llava_onevision.modeling_llava_onevision": """
            get_anyres_image_grid_shape(image_size grid_pinpoints patch_size /)
        """,
        "transformers.models.qwen2_vl.modeling_qwen2_vl": EAGER,
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": EAGER,
        "transformers.models.qwen3_vl.modeling_qwen3_vl": EAGER,
        "transformers.models.siglip.modeling_siglip": EAGER,
        "transformers.models.smolvlm.modeling_smolvlm": EAGER,
        "transformers.processing_utils": """
            MultiModalData.num_image_tokens
            ProcessorMixin.__call__(images text **)
            ProcessorMixin.apply_chat_template(conversation / add_generation_prompt)
            ProcessorMixin.chat_template?
            ProcessorMixin.from_pretrained(pretrained_model_name_or_path / **)
            ProcessorMixin.get_processor_dict(pretrained_model_name_or_path / **)
        """,
        "transformers.utils": """
            ModelOutput.to_tuple
            cached_file(path_or_repo_id filename / **)
            is_peft_available
            can_return_tuple
            logging.get_logger
            logging.warning_once
            output_capturing.select_hidden_states @5.23
        """,
        "transformers.utils.hub": f"cached_files({HUB} _commit_hash@-5.17)",
        "transformers.utils.import_utils": "torch_compilable_check(cond msg /)",
        "transformers.vision_utils": "get_vision_window_index(grid_thw spatial_merge_size window_size patch_size /)",
    }


# What is looked up on every stock model (its class ends in ForConditionalGeneration), then on each by its model_type.
EVERY_MODEL = """
    lm_head.weight
    model._keys_to_ignore_on_load_unexpected.add
    model.config.vision_config.output_hidden_states
    model.config.return_dict
    model.device
    generation_config
    name_or_path
    config._name_or_path
    config.name_or_path
    config.model_type
    config.image_token_id
    config.text_config.hidden_size
    config.text_config.vocab_size
    config.get_text_config().hidden_size
    config.get_text_config().pad_token_id
    config.get_text_config().num_hidden_layers
    config.get_text_config().sliding_window?
    config.get_text_config().layer_types?
    config.get_text_config().rope_parameters?
    model.language_model|text_model.norm.forward
    model.language_model|text_model.gradient_checkpointing
    model.language_model|text_model.rotary_emb.forward
    model.language_model|text_model.layers[0].input_layernorm.forward
    model.language_model|text_model.layers[0].self_attn.config._attn_implementation
    model.language_model|text_model.layers[0].self_attn.forward(hidden_states position_embeddings attention_mask)
    config.get_text_config()._attn_implementation
"""
ON_MODELS = {
    "gemma3": f"""
        {TOWER.format("vision_tower")} {PATCHES}
        config.mm_tokens_per_image
        model.multi_modal_projector.avg_pool.forward
        model.multi_modal_projector.forward
        model.multi_modal_projector.patches_per_image
    """,
    "idefics3": TILES,
    "internvl": f"""
        {FEATURE_CHOICE}
        config.downsample_ratio
        config.vision_config.image_size
        config.vision_config.patch_size
        model.dtype
        model.vision_tower.forward(pixel_values / **)
        model.vision_tower.encoder.layer[0].attention.config._attn_implementation
        model.vision_tower.encoder.layer[0].forward(hidden_states)
        model.multi_modal_projector.forward
    """,
    "llava": f"""
        {TOWER.format("vision_tower")} {PATCHES} {FEATURE_CHOICE}
        model.vision_tower.vision_model?.post_layernorm.weight
        model.multi_modal_projector.forward
    """,
    "llava_next": f"""
        {TOWER.format("vision_tower")} {PATCHES} {FEATURE_CHOICE}
        model.vision_tower.vision_model?.post_layernorm.weight
        config.image_grid_pinpoints
        model.image_newline
        model.multi_modal_projector.forward
    """,
    "llava_onevision": f"""
        {TOWER.format("vision_tower")} {PATCHES} {FEATURE_CHOICE}
        config.image_grid_pinpoints
        config.video_token_id
        config.vision_aspect_ratio
        model.image_newline
        model.multi_modal_projector.forward
    """,
    "paligemma": f"{TOWER.format('vision_tower')} {PATCHES} model.multi_modal_projector.forward",
    "qwen2_5_vl": f"""
        {GRIDS}
        config.video_token_id
        model.visual.fullatt_block_indexes
        model.visual.window_size
        model.visual.patch_size
    """,
    "qwen2_vl": f"{GRIDS} config.video_token_id",
    "qwen3_vl": f"{GRIDS} config.video_token_id config.vision_config.deepstack_visual_indexes",
    "smolvlm": f"{TILES} model.text_model.generation_config",
    "video_llava": f"""
        {TOWER.format("image_tower")} {TOWER.format("video_tower")} {PATCHES} {FEATURE_CHOICE}
        config.video_token_id
        model.multi_modal_projector.forward
    """,
}
