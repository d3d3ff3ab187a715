//! containerd's image records: names that point to a manifest or an index, and keep what it refers to.

use std::{collections::HashMap, time::SystemTime};

use containerd_client::{
    services::v1::{
        CreateImageRequest, DeleteImageRequest, GetImageRequest, Image, ListImagesRequest,
        UpdateImageRequest, images_client::ImagesClient,
    },
    types::Descriptor,
};
use prost_types::FieldMask;
use tonic::transport::Channel;

use super::{CallError, Containerd};

/// An image record.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageRecord {
    /// Full reference.
    pub name: String,
    /// What it points to.
    pub target: Descriptor,
    /// When the record was made.
    pub created_at: Option<SystemTime>,
    /// When it was last written.
    pub updated_at: Option<SystemTime>,
    /// What other clients have noted on it; Cowshed notes nothing.
    pub labels: HashMap<String, String>,
}

impl Containerd {
    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(super::MAX_MESSAGE_BYTES)
    }

    /// The record of that name, if there is one.
    pub async fn image(&self, name: &str) -> Result<Option<ImageRecord>, CallError> {
        let request = self.request(GetImageRequest { name: name.to_owned() });
        match self.call("Images.Get", self.images().get(request)).await {
            Ok(reply) => Ok(reply.image.and_then(record)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All records.
    pub async fn list_images(&self) -> Result<Vec<ImageRecord>, CallError> {
        let request = self.request(ListImagesRequest::default());
        let reply = self.call("Images.List", self.images().list(request)).await?;
        Ok(reply.images.into_iter().filter_map(record).collect())
    }

    /// Makes the record, or points it to `target`.
    pub async fn put_image(
        &self,
        lease: &str,
        name: &str,
        target: Descriptor,
    ) -> Result<ImageRecord, CallError> {
        let image = Image { name: name.to_owned(), target: Some(target), ..Default::default() };
        let create = CreateImageRequest { image: Some(image.clone()), ..Default::default() };
        let made = match self.call("Images.Create", self.images().create(self.leased(lease, create))).await {
            Ok(reply) => reply.image,
            Err(error) if error.is_already_exists() => {
                let update = UpdateImageRequest {
                    image: Some(image.clone()),
                    update_mask: Some(FieldMask { paths: vec!["target".to_owned()] }),
                    ..Default::default()
                };
                self.call("Images.Update", self.images().update(self.leased(lease, update))).await?.image
            }
            Err(error) => return Err(error),
        };
        let fallback = ImageRecord {
            name: image.name,
            target: image.target.unwrap_or_default(),
            created_at: Some(SystemTime::now()),
            ..ImageRecord::default()
        };
        Ok(made.and_then(record).unwrap_or(fallback))
    }

    /// Removes the record if it still has its target (containerd 1.7: whatever it has by now), and says whether it was there.
    /// With `sync` a garbage collection is run and waited for.
    pub async fn remove_image(&self, record: &ImageRecord, sync: bool) -> Result<bool, CallError> {
        let (name, target) = (record.name.clone(), Some(record.target.clone()));
        let request = self.request(DeleteImageRequest { name, sync, target });
        match self.call("Images.Delete", self.images().delete(request)).await {
            Ok(()) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn record(image: Image) -> Option<ImageRecord> {
    let time = |at: Option<prost_types::Timestamp>| at.and_then(|at| SystemTime::try_from(at).ok());
    Some(ImageRecord {
        name: image.name,
        target: image.target?,
        created_at: time(image.created_at),
        updated_at: time(image.updated_at),
        labels: image.labels,
    })
}
