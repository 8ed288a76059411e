"""Merge operators: `merge.method(params_0, taus, ...) -> params`.

Every method is a plain function of pre-trained parameters and task vectors. Both are
pytrees of arrays. A method merges one leaf at a time, and takes that leaf from all
tasks. Some methods first pass over all leaves to gather small statistics. Sums are
taken in float32 or better and cast once, to the dtype of `params_0`.
"""

from jaxarith.merge import mergekit as mergekit
from jaxarith.merge._matrices import input_axis as input_axis
from jaxarith.merge.ace import ace as ace
from jaxarith.merge.adamerging import AdaMerging as AdaMerging
from jaxarith.merge.adamerging import adamerging as adamerging
from jaxarith.merge.adamerging_tangent import adamerging_tangent as adamerging_tangent
from jaxarith.merge.adarank import AdaRank as AdaRank
from jaxarith.merge.adarank import adarank as adarank
from jaxarith.merge.average import average as average
from jaxarith.merge.awd import awd as awd
from jaxarith.merge.bases import Bases as Bases
from jaxarith.merge.bases import bases as bases
from jaxarith.merge.bases import basis_vectors as basis_vectors
from jaxarith.merge.bases_arithmetic import Generalization as Generalization
from jaxarith.merge.bases_arithmetic import bases_generalization as bases_generalization
from jaxarith.merge.bases_arithmetic import bases_negation as bases_negation
from jaxarith.merge.breadcrumbs import breadcrumbs as breadcrumbs
from jaxarith.merge.cart import cart as cart
from jaxarith.merge.consensus import consensus as consensus
from jaxarith.merge.core import Core as Core
from jaxarith.merge.core import Factors as Factors
from jaxarith.merge.core import core as core
from jaxarith.merge.curvature import curvature as curvature
from jaxarith.merge.dare import dare as dare
from jaxarith.merge.dc_merge import dc_merge as dc_merge
from jaxarith.merge.della import della as della
from jaxarith.merge.della import magprune as magprune
from jaxarith.merge.drop import drop as drop
from jaxarith.merge.emr import emr as emr
from jaxarith.merge.emr import emr_masks as emr_masks
from jaxarith.merge.esm import esm as esm
from jaxarith.merge.fisher import fisher as fisher
from jaxarith.merge.fisher import fisher_diagonal as fisher_diagonal
from jaxarith.merge.greedy_soup import GreedySoup as GreedySoup
from jaxarith.merge.greedy_soup import greedy_soup as greedy_soup
from jaxarith.merge.iso_c import iso_c as iso_c
from jaxarith.merge.iso_cts import iso_cts as iso_cts
from jaxarith.merge.isotropise import isotropise as isotropise
from jaxarith.merge.karcher import karcher as karcher
from jaxarith.merge.linear_bases import LinearBases as LinearBases
from jaxarith.merge.linear_bases import autoencoder as autoencoder
from jaxarith.merge.linear_bases import pca as pca
from jaxarith.merge.linear_bases import recover as recover
from jaxarith.merge.lines import lines as lines
from jaxarith.merge.localize_and_stitch import localize as localize
from jaxarith.merge.localize_and_stitch import (
    localize_and_stitch as localize_and_stitch,
)
from jaxarith.merge.magmax import magmax as magmax
from jaxarith.merge.mask_sharing import mask_sharing as mask_sharing
from jaxarith.merge.metagpt import metagpt_coefs as metagpt_coefs
from jaxarith.merge.methods import METHODS as METHODS
from jaxarith.merge.methods import WRAPPERS as WRAPPERS
from jaxarith.merge.methods import Method as Method
from jaxarith.merge.methods import Wrapper as Wrapper
from jaxarith.merge.model_stock import model_stock as model_stock
from jaxarith.merge.pcb import pcb as pcb
from jaxarith.merge.polarize import polarize as polarize
from jaxarith.merge.regmean import regmean as regmean
from jaxarith.merge.regmean_plusplus import regmean_plusplus as regmean_plusplus
from jaxarith.merge.slerp import slerp as slerp
from jaxarith.merge.stitch_twice import stitch_twice as stitch_twice
from jaxarith.merge.subspace_boosting import subspace_boosting as subspace_boosting
from jaxarith.merge.surgery import Surgery as Surgery
from jaxarith.merge.surgery import surgery as surgery
from jaxarith.merge.svc import svc as svc
from jaxarith.merge.tall_masks import tall_masks as tall_masks
from jaxarith.merge.tall_masks import tall_thresholds as tall_thresholds
from jaxarith.merge.task_arithmetic import task_arithmetic as task_arithmetic
from jaxarith.merge.ties import ties as ties
from jaxarith.merge.topk import topk as topk
from jaxarith.merge.tsv import tsv as tsv
from jaxarith.merge.wise_ft import wise_ft as wise_ft
from jaxarith.merge.wudi import wudi as wudi
